"""The parts of the page, one a file; each has a function `section` and a template of the same name."""
