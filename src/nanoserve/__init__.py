"""nanoserve: an LLM serving engine that people can read. Start at request.py; build.py is the table of contents."""
