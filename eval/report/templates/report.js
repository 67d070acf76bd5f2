"use strict";
(() => {
  // --- tables: a click on a column's name sorts by it, once more the other way ---------------------

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

  const sortBy = (table, header, column) => {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const numbers = rows.every((row) => typeof valueOf(row, column) !== "string");
    const before = header.getAttribute("aria-sort");
    // Numbers begin with the largest, words with A.
    const direction = before === null ? (numbers ? "descending" : "ascending")
      : before === "ascending" ? "descending" : "ascending";
    for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    rows.sort((a, b) => compare(valueOf(a, column), valueOf(b, column), sign));
    body.append(...rows);
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((header, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = header.textContent;
      header.replaceChildren(button);
      button.addEventListener("click", () => sortBy(table, header, column));
    });
  }

  // --- items ---------------------------------------------------------------------------------------

  const source = document.getElementById("items-data");
  if (source === null) return;
  const { outcomes, sets, questions } = JSON.parse(source.textContent);
  const PER_PAGE = 20;
  const LETTERS = "ABCDEFGHIJ";
  const WHO = { teacher: "teacher", before: "student before training", student: "student" };
  const LABELS = ["yes", "no", "maybe", "true", "false", "mixture", "unproven"];
  const find = (id) => document.getElementById(id);
  const state = { set: sets[0], outcome: "", query: "", page: 0 };

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
      for (const who in WHO) texts.push(item[who]?.text);
      item.words = texts.filter(Boolean).join("\n").toLowerCase();
    }
    return item.words;
  };

  // A count of a table may mean several outcomes: of an item that both have wrong there are two kinds.
  const hasOutcome = (item, outcome) => outcome === "" || item.outcome === outcome
    || (outcome === "wrong" && (item.outcome === "inherited" || item.outcome === "both_wrong"));

  const optionName = (question, choice) => {
    if (choice === null || choice === undefined) return "none that can be read";
    const text = question.options?.[choice];
    if (text === undefined) return `option ${choice + 1}`;
    return LABELS.includes(text) ? text : `${LETTERS[choice]}. ${text}`;
  };

  const showOptions = (question, item) => {
    const list = make("ul", "options");
    question.options.forEach((_, index) => {
      const line = make("li", index === question.answer ? "correct" : "");
      line.append(make("span", "name", optionName(question, index)));
      if (index === question.answer) line.append(make("span", "picked tag right", "right answer"));
      for (const who of ["teacher", "student"]) {
        const answer = item[who];
        if (answer === undefined) continue;
        if (answer.choice === index) line.append(make("span", `picked who-${who}`, `◀ ${who}`));
        if (answer.chances) {
          line.append(make("span", "chance", `${who} ${(100 * answer.chances[index]).toFixed(0)} %`));
        }
      }
      list.append(line);
    });
    return list;
  };

  const showAnswer = (who, answer, question) => {
    const box = make("div", who);
    box.append(make("h3", "", WHO[who]));
    if (answer.choice !== undefined && (answer.text !== undefined || !question.options)) {
      box.append(make("p", "note", `answers: ${optionName(question, answer.choice)}`));
    }
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
    const card = make("article", "item");
    const header = make("header", "");
    if (item.outcome) header.append(make("span", `tag ${item.outcome}`, outcomes[item.outcome]));
    header.append(make("span", "", item.id));
    card.append(header, make("p", "question", question.text ?? "(the question is not at hand)"));
    if (question.context) {
      const details = make("details", "");
      details.append(make("summary", "", "what it is asked about"), make("p", "context", question.context));
      card.append(details);
    }
    if (question.options) card.append(showOptions(question, item));
    const answers = make("div", "answers");
    if (question.reference) {
      const box = make("div", "reference");
      box.append(make("h3", "", "reference"), make("p", "text", question.reference));
      answers.append(box);
    }
    for (const who in WHO) {
      const answer = item[who];
      if (answer && (answer.text !== undefined || !question.options)) answers.append(showAnswer(who, answer, question));
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
    for (const item of searched) if (item.outcome) counts.set(item.outcome, (counts.get(item.outcome) ?? 0) + 1);
    const present = new Set(state.set.items.map((item) => item.outcome));
    const choices = Object.entries(outcomes).filter(([name]) => present.has(name));
    if (present.has("inherited") || present.has("both_wrong")) {
      choices.push(["wrong", "both wrong"]);
      counts.set("wrong", (counts.get("inherited") ?? 0) + (counts.get("both_wrong") ?? 0));
    }
    const buttons = [["", "all"], ...choices].map(([name, label]) => {
      const button = make("button", "", `${label} (${(counts.get(name) ?? 0).toLocaleString("en")})`);
      button.type = "button";
      button.dataset.outcome = name;
      button.setAttribute("aria-pressed", String(name === state.outcome));
      return button;
    });
    const focused = document.activeElement?.dataset?.outcome;
    const inside = find("outcomes").contains(document.activeElement);
    find("outcomes").replaceChildren(...buttons);
    if (inside) buttons.find((button) => button.dataset.outcome === focused)?.focus();
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

  const choose = (name, outcome) => {
    const set = sets.find((each) => each.name === name);
    if (set === undefined) return;
    find("set").value = name;
    find("search").value = "";
    update({ set, outcome, query: "" });
  };

  sets.forEach((set) => {
    const option = make("option", "", `${set.label} (${set.items.length.toLocaleString("en")})`);
    option.value = set.name;
    find("set").append(option);
  });
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
