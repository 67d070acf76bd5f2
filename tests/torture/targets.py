"""What is damaged, and what a user would start on it."""

from torture import folders, texts
from torture.fuzz import Target

TARGETS = [*(Target(*entry) for entry in (*texts.TARGETS, *folders.TARGETS))]
