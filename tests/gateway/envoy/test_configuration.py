"""The files themselves: in step with the contract and with each other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT = Path(__file__).resolve().parents[3]
CONFIGURATION = ROOT / "gateway" / "envoy"
ENVOY = Path(sys.executable).parent / "envoy"
SERVERS = ("one-server.yaml", "several-servers.yaml")


def clusters_of(name):
    return yaml.safe_load((CONFIGURATION / name).read_text())["static_resources"]["clusters"]


@pytest.mark.parametrize("servers", SERVERS)
def test_envoy_takes_the_configuration_and_finds_nothing_odd_about_it(servers):
    command = [ENVOY, "--mode", "validate", "-c", "envoy.yaml", "--config-yaml", (CONFIGURATION / servers).read_text()]
    done = subprocess.run(command, cwd=CONFIGURATION, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"\[(warning|error|critical)\]|deprecated", done.stderr), done.stderr


def test_the_two_files_of_servers_differ_only_in_balancing_and_in_numbers():
    balancing = {"lb_policy", "load_assignment"}

    def shared(cluster):
        rest = {key: value for key, value in cluster.items() if key not in balancing}
        rest["common_lb_config"] = {**rest["common_lb_config"]}
        rest["common_lb_config"].pop("consistent_hashing_lb_config", None)
        [thresholds] = rest.pop("circuit_breakers")["thresholds"]
        return {**rest, "limits": sorted(thresholds)}

    one, several = map(clusters_of, SERVERS)
    assert [shared(cluster) for cluster in one] == [shared(cluster) for cluster in several]


def test_no_route_to_a_server_has_a_time_out_of_its_own():
    text = (CONFIGURATION / "envoy.yaml").read_text()
    [listener] = yaml.safe_load(text)["static_resources"]["listeners"]
    [filter_] = listener["filter_chains"][0]["filters"]
    [host] = filter_["typed_config"]["route_config"]["virtual_hosts"]
    routes = [route["route"] for route in host["routes"] if "route" in route]
    assert {route["cluster"] for route in routes} == {"server", "openai"}
    assert {route["timeout"] for route in routes} == {"0s"}


def test_the_descriptor_set_is_in_step_and_the_check_can_fail(tmp_path):
    tool = ROOT / "tools" / "generate_descriptor_set.py"
    copy = tmp_path / "tools" / tool.name
    copy.parent.mkdir()
    copy.write_text(tool.read_text())
    stale = tmp_path / "gateway" / "envoy" / "nanoserve.binpb"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"stale")
    outcomes = [
        subprocess.run([sys.executable, path, "--check"], capture_output=True, text=True) for path in (tool, copy)
    ]
    assert [done.returncode for done in outcomes] == [0, 1]
    assert "run tools/generate_descriptor_set.py" in outcomes[1].stderr


def test_the_descriptor_set_has_error_details_and_no_admin_service():
    described = FileDescriptorSet.FromString((CONFIGURATION / "nanoserve.binpb").read_bytes())
    messages = {f"{file.package}.{message.name}" for file in described.file for message in file.message_type}
    assert {"google.rpc.BadRequest", "google.rpc.RetryInfo", "google.rpc.ErrorInfo"} <= messages
    services = {service.name for file in described.file for service in file.service}
    assert services == {"GenerationService", "ModelService"}
