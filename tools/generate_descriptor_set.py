"""Makes the descriptor set from which Envoy knows the contract, to turn JSON into gRPC; the result is committed.

    python tools/generate_descriptor_set.py            write gateway/envoy/nanoserve.binpb
    python tools/generate_descriptor_set.py --check    fail if what is committed differs from what would be written

It holds what the client's stubs know, which are made from `protos/`: the services that have paths for JSON, all that
they refer to, and google.rpc's error details, which the services do not refer to but which every error carries. It
leaves AdminService out: what is not described cannot be reached through JSON.
"""

import argparse
import sys
from pathlib import Path

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.rpc import error_details_pb2
from nanoserve_client.v1 import generation_pb2, model_pb2

DESCRIPTOR_SET = Path(__file__).resolve().parent.parent / "gateway" / "envoy" / "nanoserve.binpb"
ROOTS = (generation_pb2, model_pb2, error_details_pb2)


def generate() -> bytes:
    """A serialized FileDescriptorSet in which each file comes after the ones that it imports."""
    files: dict[str, FileDescriptorProto] = {}
    for root in ROOTS:
        _add(root.DESCRIPTOR, files)
    return FileDescriptorSet(file=files.values()).SerializeToString(deterministic=True)


def _add(file: FileDescriptor, files: dict[str, FileDescriptorProto]) -> None:
    if file.name in files:
        return
    for imported in file.dependencies:
        _add(imported, files)
    files[file.name] = FileDescriptorProto.FromString(file.serialized_pb)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make Envoy's descriptor set from the client's stubs.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    made = generate()
    if not parser.parse_args().check:
        DESCRIPTOR_SET.write_bytes(made)
    elif not DESCRIPTOR_SET.exists() or DESCRIPTOR_SET.read_bytes() != made:
        sys.exit(f"{DESCRIPTOR_SET} does not match the stubs: run tools/generate_descriptor_set.py")


if __name__ == "__main__":
    main()
