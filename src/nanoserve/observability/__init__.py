"""What an operator sees of a running server: traces, metrics, a log line a request, and its last steps and requests.

Each kind is an Observer and can be taken out alone. The command line sets them up, all but the flight recorder by
telemetry.py; that one alone is known to rpc too, whose AdminService it answers.
"""
