"""The benchmarks: how fast an engine is by itself (offline), and how a server feels to its callers (serve).

workload.py  what is asked for      load.py    asks a server for it, and notes when what came
offline.py   `bench offline`        report.py  what was noted → figures;  plot.py: → a picture
serve.py     `bench serve`
"""
