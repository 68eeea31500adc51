import ipaddress
import json
import os
import signal
import sys
import threading
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from scripted_server import overloaded

from nanoserve.bench import serve
from nanoserve.cli.flags import Parser
from nanoserve.cli.terminal import CommandError
from nanoserve.config import ConfigError


def bench(*argv: str) -> int:
    parser = Parser("nanoserve bench serve")
    serve.add_arguments(parser)
    return serve.run(parser.parse_args(argv))


def test_workloads_run_in_turn_each_with_a_table(target, capsys):
    assert bench("--target", target.address, "--workload", "3:8:5", "2:20:3:12", "sharegpt:2") == 0
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [
        "3:8:5, all at once",
        "2:20:3:12, all at once",
        "sharegpt:2, all at once",
    ]
    assert "3 of 3 completed" in out
    assert "15, 1.0 a Delta" in out
    assert err == ""
    sent = [(len(r.token_ids.ids), r.stopping.max_tokens) for r in target.generate_requests]
    assert sent[:5] == [(8, 5), (8, 5), (8, 5), (20, 3), (20, 3)]


def test_prompts_fit_the_model_that_the_server_has(target):
    bench("--target", target.address, "--workload", "2:100:1")
    assert {token for r in target.generate_requests for token in r.token_ids.ids} <= set(range(10, 50))
    with pytest.raises(ConfigError, match="the model has one of 200"):
        bench("--target", target.address, "--workload", "1:1:1", "1:200:1")
    assert len(target.generate_requests) == 2


def test_json_on_standard_output_is_alone_there(target, capsys):
    assert bench("--target", target.address, "--workload", "2:8:5", "3:8:5", "--rate", "200", "--json", "-") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["workload"], r["n"], r["completed"], r["rate"]) for r in lines] == [
        ("2:8:5", 2, 2, 200),
        ("3:8:5", 3, 3, 200),
    ]
    assert lines[1]["output_tokens"] == 15
    assert lines[1]["ttft_ms"]["p99"] > 0


def test_json_and_picture_go_to_files_besides_the_table(target, capsys, tmp_path):
    file, picture = tmp_path / "run.json", tmp_path / "run.svg"
    bench("--target", target.address, "--workload", "2:8:5", "--json", str(file), "--plot", str(picture))
    assert "2 of 2 completed" in capsys.readouterr().out
    assert json.loads(file.read_text())["completed"] == 2
    assert picture.read_text().startswith("<?xml")


def test_goodput_is_measured_against_the_limits_given(target, capsys):
    limits = ("--max-ttft-ms", "60000", "--max-itl-ms", "60000", "--max-e2e-ms", "0.001")
    assert bench("--target", target.address, "--workload", "2:8:5", "--json", "-", *limits) == 0
    goodput = json.loads(capsys.readouterr().out)["goodput"]
    assert goodput == {"limits_ms": {"ttft": 60000, "itl": 60000, "e2e": 0.001}, "share": 0, "req_s": 0}


def test_failed_requests_are_counted_and_show_in_the_exit_code(target, capsys):
    target.script.generate = lambda _, context: context.abort_with_status(overloaded(pushback_ms=-1))
    assert bench("--target", target.address, "--workload", "2:8:5") == 1
    assert "0 of 2 completed, 2 failed (OVERLOADED)" in capsys.readouterr().out


def test_a_full_disk_is_told_of_in_one_line_after_the_table(target, capsys):
    with pytest.raises(ConfigError, match="--json is '/dev/full'; it cannot be written: No space left on device"):
        bench("--target", target.address, "--workload", "2:8:5", "--json", "/dev/full")
    assert "2 of 2 completed" in capsys.readouterr().out


@pytest.fixture
def interrupt(target):
    """Makes the server answer the first request of so many prompt tokens with Ctrl-C, and those never."""
    obey = target.script.generate

    def of(num_prompt_tokens: int) -> None:
        signals = iter([signal.SIGINT])

        def generate(request, context):
            if len(request.token_ids.ids) == num_prompt_tokens:
                for number in signals:
                    os.kill(os.getpid(), number)
                is_gone = threading.Event()
                if context.add_callback(is_gone.set):  # else it is already
                    is_gone.wait()
            yield from obey(request, context)

        target.script.generate = generate

    return of


def test_ctrl_c_reports_what_there_is_and_starts_no_further_workload(target, interrupt, capsys):
    interrupt(8)
    assert bench("--target", target.address, "--workload", "2:8:5", "1:9:5", "--json", "-") == 128 + signal.SIGINT
    (line,) = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert (report["workload"], report["completed"], report["unfinished"]) == ("2:8:5", 0, 2)
    assert all(len(r.token_ids.ids) != 9 for r in target.generate_requests)


def test_ctrl_c_before_anything_was_measured_reports_nothing(target, interrupt, capsys):
    interrupt(16)
    assert bench("--target", target.address, "--workload", "1:8:5") == 128 + signal.SIGINT
    assert capsys.readouterr().out == ""


def test_a_bar_moves_on_a_terminal_only(target, capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: self is sys.stderr, raising=False)
    bench("--target", target.address, "--workload", "2:8:5")
    assert "2:8:5:   0%" in capsys.readouterr().err


def test_the_key_is_sent(target):
    bench("--target", target.address, "--workload", "1:8:5", "--api-key", "abc")
    assert {metadata["authorization"] for metadata in target.script.metadata} == {"Bearer abc"}


def test_tls_is_spoken_with_the_authority_given(start_server, tmp_path, capsys):
    key, certificate = self_signed()
    secure = start_server(grpc.ssl_server_credentials([(key, certificate)]))
    (tmp_path / "ca.pem").write_bytes(certificate)
    assert bench("--target", secure.address, "--workload", "1:8:5", "--tls-ca", str(tmp_path / "ca.pem")) == 0
    assert "1 of 1 completed" in capsys.readouterr().out


def self_signed() -> tuple[bytes, bytes]:
    """Key and certificate of 127.0.0.1, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    now = datetime.now(UTC)
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    certificate = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, certificate.public_bytes(encoding)


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        ([], ConfigError, "--target is missing"),
        (["--target", "127.0.0.1:1"], CommandError, "no server is ready at 127.0.0.1:1"),
        (["--target", "127.0.0.1:1", "--tls-ca", "nowhere.pem"], CommandError, "cannot read nowhere.pem"),
        (["--target", "127.0.0.1:1", "--api-key", "a\n"], CommandError, "printable ASCII"),
        (["--target", "127.0.0.1:1", "--json", "nowhere/run.json"], ConfigError, "cannot be written"),
        (["--target", "127.0.0.1:1", "--plot", "run.gif"], ConfigError, r"must end in \.png or \.svg"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(argv, error, message):
    with pytest.raises(error, match=message) as caught:
        bench("--workload", "1:8:5", *argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "argv", [["--workload", "1:2"], ["--rate", "0"], ["--max-ttft-ms", "nan"], ["--rate", "x"], []]
)
def test_arguments_that_mean_nothing_are_refused(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench("--target", "127.0.0.1:1", *argv)
    assert len(capsys.readouterr().err.splitlines()) == 1
