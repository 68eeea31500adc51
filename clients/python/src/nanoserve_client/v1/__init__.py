"""Generated from protos/nanoserve/v1 by tools/generate_stubs.py: messages and service stubs."""
