"use strict";
(() => {
  // --- tables: clicks on a column's name sort by it, the other way, and as it was -------------------

  const valueOf = (row, column) => {
    const given = row.cells[column].dataset.sort;
    if (given === undefined) return null;
    const number = Number(given);
    return given !== "" && Number.isFinite(number) ? number : given;
  };

  // What is missing comes last in either direction.
  const compare = (a, b, sign) => {
    if (a === null || b === null) return (a === null) - (b === null);
    if (typeof a === "number" && typeof b === "number") return sign * (a - b);
    return sign * String(a).localeCompare(String(b), "en", { numeric: true });
  };

  const nextOrder = (now, numbers) => {
    // Numbers begin with the largest, words with A.
    const orders = numbers ? [null, "descending", "ascending"] : [null, "ascending", "descending"];
    return orders[(orders.indexOf(now) + 1) % 3];
  };

  const sortBy = (table, given, header, column) => {
    const numbers = given.every((row) => typeof valueOf(row, column) !== "string");
    const order = nextOrder(header.getAttribute("aria-sort"), numbers);
    for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
    const rows = [...given];
    if (order !== null) {
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      rows.sort((a, b) => compare(valueOf(a, column), valueOf(b, column), sign));
    }
    table.tBodies[0].append(...rows);
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const given = [...table.tBodies[0].rows];
    [...table.tHead.rows[0].cells].forEach((header, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = header.textContent;
      header.replaceChildren(button);
      button.addEventListener("click", () => sortBy(table, given, header, column));
    });
  }

  // --- items ---------------------------------------------------------------------------------------

  const source = document.getElementById("items-data");
  const { outcomes, students, sets, questions } = source === null ? { sets: [] } : JSON.parse(source.textContent);
  for (const link of document.querySelectorAll("a[data-set]")) {
    const known = sets.some((set) => set.name === link.dataset.set);
    if (!known) link.replaceWith(link.textContent);
  }
  if (source === null) return;
  const PER_PAGE = 20;
  const LETTERS = "ABCDEFGHIJ";
  const LABELS = ["yes", "no", "maybe", "true", "false", "mixture", "unproven"];
  const find = (id) => document.getElementById(id);
  // `student`: whose outcomes are shown, where there are several students.
  const state = { set: sets[0], student: students[0], outcome: "", query: "", page: 0 };

  // Text from data or models only ever becomes a text node.
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  const words = (item) => {
    if (item.words === undefined) {
      const question = questions[item.question];
      const texts = [item.id, question.text, question.reference, ...(question.options ?? [])];
      for (const answer of Object.values(item.answers)) texts.push(answer.text);
      item.words = texts.filter(Boolean).join("\n").toLowerCase();
    }
    return item.words;
  };

  const outcomeOf = (item) => item.outcomes[state.student];

  // An inherited error is one of those that both make.
  const hasOutcome = (item, wanted) => wanted === "" || outcomeOf(item) === wanted
    || (wanted === "both_wrong" && outcomeOf(item) === "inherited");

  const optionName = (question, choice) => {
    if (choice === null) return "nothing that can be read";
    const text = question.options?.[choice];
    if (text === undefined) return `option ${choice + 1}`;
    return LABELS.includes(text) ? text : `${LETTERS[choice]}. ${text}`;
  };

  const colour = (who) => (who === "teacher" ? "who-teacher" : "who-student");

  const showOptions = (question, answers) => {
    const list = make("ul", "options");
    question.options.forEach((_, index) => {
      const line = make("li", index === question.answer ? "correct" : "");
      const name = make("span", "name", optionName(question, index));
      if (index === question.answer) name.append(" ", make("span", "tag right", "right answer"));
      const picks = make("span", "picks");
      for (const [who, answer] of Object.entries(answers)) {
        const picked = answer.choice === index;
        if (!picked && answer.chances === undefined) continue;
        const chance = answer.chances === undefined ? "" : ` ${(100 * answer.chances[index]).toFixed(0)} %`;
        picks.append(make("span", picked ? `picked ${colour(who)}` : "", `${picked ? "● " : ""}${who}${chance}`));
      }
      line.append(name, picks);
      list.append(line);
    });
    return list;
  };

  const showAnswer = (who, answer, question) => {
    const box = make("div", "");
    box.append(make("h3", colour(who), who));
    if (answer.choice !== undefined) box.append(make("p", "note", `answers ${optionName(question, answer.choice)}`));
    if (answer.text !== undefined) box.append(make("p", "text", answer.text || "(nothing)"));
    if (answer.finished === false) box.append(make("p", "note", "cut at the length limit"));
    if (answer.claims) {
      const list = make("ul", "claims");
      for (const claim of answer.claims) {
        const line = make("li", "");
        line.append(make("span", `tag ${claim.bin}`, claim.bin), ` ${claim.text}`);
        list.append(line);
      }
      box.append(list);
    }
    return box;
  };

  const showItem = (item) => {
    const question = questions[item.question];
    const outcome = outcomeOf(item);
    const card = make("article", "item");
    const header = make("header", "");
    if (outcome) header.append(make("span", `tag ${outcome}`, outcomes[outcome][0]));
    header.append(make("span", "", item.id));
    card.append(header, make("p", "question", question.text ?? "(the question is not at hand)"));
    if (question.context) {
      const details = make("details", "");
      details.append(make("summary", "", "what it is asked about"), make("p", "context", question.context));
      card.append(details);
    }
    if (question.options) {
      card.append(showOptions(question, item.answers));
    } else if (question.answer !== undefined) {
      card.append(make("p", "note", `right is ${optionName(question, question.answer)}`));
    }
    const answers = make("div", "answers");
    if (question.reference) {
      const box = make("div", "");
      box.append(make("h3", "", "reference"), make("p", "text", question.reference));
      answers.append(box);
    }
    for (const [who, answer] of Object.entries(item.answers)) {
      // A choice among options that are shown says all; what was written is shown besides.
      if (answer.text !== undefined || !question.options || answer.choice === null) {
        answers.append(showAnswer(who, answer, question));
      }
    }
    if (answers.childElementCount) card.append(answers);
    const scores = Object.entries(item.scores ?? {}).map(([name, value]) => `${name} ${value}`);
    if (scores.length) card.append(make("p", "scores", scores.join(" · ")));
    const line = make("li", "");
    line.append(card);
    return line;
  };

  const showOutcomes = (searched) => {
    const counts = new Map([["", searched.length]]);
    const count = (outcome) => counts.set(outcome, (counts.get(outcome) ?? 0) + 1);
    for (const item of searched) {
      count(outcomeOf(item));
      if (outcomeOf(item) === "inherited") count("both_wrong");
    }
    const present = new Set(state.set.items.map(outcomeOf));
    if (present.has("inherited")) present.add("both_wrong");
    const names = Object.keys(outcomes).filter((name) => present.has(name));
    const buttons = (names.length ? ["", ...names] : []).map((name) => {
      const label = name === "" ? "all" : outcomes[name][0];
      const button = make("button", "", `${label} (${(counts.get(name) ?? 0).toLocaleString("en")})`);
      button.type = "button";
      if (name !== "") button.title = outcomes[name][1];
      button.dataset.outcome = name;
      button.setAttribute("aria-pressed", String(name === state.outcome));
      return button;
    });
    const group = find("outcomes");
    const focused = group.contains(document.activeElement) ? document.activeElement.dataset.outcome : null;
    group.replaceChildren(...buttons);
    buttons.find((button) => button.dataset.outcome === focused)?.focus();
    find("legend").textContent = names.map((name) => `${outcomes[name][0]}: ${outcomes[name][1]}`).join(" · ");
  };

  const show = () => {
    const query = state.query.trim().toLowerCase();
    const searched = query ? state.set.items.filter((item) => words(item).includes(query)) : state.set.items;
    const found = searched.filter((item) => hasOutcome(item, state.outcome));
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    state.page = Math.min(state.page, pages - 1);
    const first = state.page * PER_PAGE;
    const shown = found.slice(first, first + PER_PAGE);
    showOutcomes(searched);
    find("list").replaceChildren(...shown.map(showItem));
    find("count").textContent = found.length === 0 ? "Nothing found."
      : `Items ${first + 1} to ${first + shown.length} of ${found.length.toLocaleString("en")}`;
    find("page").textContent = `page ${state.page + 1} of ${pages}`;
    find("previous").disabled = state.page === 0;
    find("next").disabled = state.page === pages - 1;
    find("pages").hidden = pages === 1;
  };

  const update = (changes) => {
    Object.assign(state, { page: 0 }, changes);
    show();
  };

  const turn = (by) => {
    update({ page: state.page + by });
    find("count").scrollIntoView({ block: "start" });
  };

  const choose = (name, outcome, student = state.student) => {
    const set = sets.find((each) => each.name === name);
    find("set").value = name;
    find("student").value = student;
    find("search").value = "";
    update({ set, student, outcome, query: "" });
  };

  sets.forEach((set) => {
    const option = make("option", "", `${set.label} (${set.items.length.toLocaleString("en")})`);
    option.value = set.name;
    find("set").append(option);
  });
  students.forEach((name) => find("student").append(make("option", "", name)));
  find("student").parentElement.hidden = students.length === 1;
  find("student").addEventListener("change", (event) => update({ student: event.target.value }));
  find("set").addEventListener("change", (event) => choose(event.target.value, ""));
  let typing;
  find("search").addEventListener("input", (event) => {
    clearTimeout(typing);
    typing = setTimeout(() => update({ query: event.target.value }), 120);
  });
  find("outcomes").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button !== null) update({ outcome: button.dataset.outcome });
  });
  find("previous").addEventListener("click", () => turn(-1));
  find("next").addEventListener("click", () => turn(1));
  for (const link of document.querySelectorAll("a[data-set]")) {
    link.addEventListener("click", () => choose(link.dataset.set, link.dataset.outcome));
  }
  find("browser").hidden = false;
  show();
})();
