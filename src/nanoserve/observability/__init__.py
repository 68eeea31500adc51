"""What an operator sees of a running server: traces, metrics and a log line a request.

Each kind is an Observer and can be taken out alone; telemetry.py sets them up.
"""
