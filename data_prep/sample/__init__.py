"""The packaged sample: 176 records written for this project, for trying things out and for tests."""
