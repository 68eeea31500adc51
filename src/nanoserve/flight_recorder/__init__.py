"""The flight recorder: the last moments of the engine, for AdminService's WatchEngine and ExplainRequest.

To take it out, delete this folder and the lines of cli/serve.py that name it; both RPCs are then UNIMPLEMENTED.
"""
