"""The gRPC server. Imports no torch."""
