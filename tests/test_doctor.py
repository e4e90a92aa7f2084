"""`npc-runtime doctor`: what it says of machines that are not here, and of this one."""

import io
import json
import os
import socket
import subprocess
import sys

import pytest
from rich.console import Console

from npc_runtime.discovery import Endpoint
from npc_runtime.doctor.examination import show
from npc_runtime.doctor.finding import Finding, Report, examine
from npc_runtime.doctor.machine import Cpu, Gpu, check_cpu, check_disk, check_folder, check_gpu, check_memory
from npc_runtime.doctor.project import Base, check_base, check_daemon, check_personas_of, check_port
from npc_runtime.doctor.software import GpuTools, check_gpu_tools, check_packages, check_python, check_torch
from npc_runtime.engine import device
from npc_runtime.errors import StartupError
from npc_runtime.persona import Library
from npc_runtime.running import Health

GB = 10**9
ENDPOINT = Endpoint(port=4711, pid=99, token=None, protocol=1, base="x")
SMALL = Base("x", None, GB, 8_192, "bfloat16", None, False)


def levels(findings):
    return [finding.level for finding in findings]


def only(findings):
    (finding,) = findings
    return finding


def test_a_check_that_raises_is_a_finding_and_the_others_go_on():
    def breaks():
        yield Finding("first", "ok", "seen")
        raise OSError("the disk\nis gone")

    def refuses():
        raise StartupError("There is no base.", "Get one.")

    def lacks():
        import npc_runtime.no_such_module  # noqa: F401

    found = examine([("a", breaks), ("b", refuses), ("c", lacks), ("d", check_python)])
    assert [finding.topic for finding in found] == ["first", "a", "b", "c", "python"]
    assert levels(found) == ["ok", "wrong", "wrong", "wrong", "ok"]
    assert "OSError: the disk is gone" in found[1].text
    assert (found[2].text, found[2].remedy) == ("There is no base.", "Get one.")
    assert "Install npc-runtime again" in found[3].remedy


def test_only_what_is_wrong_is_not_well():
    slow = Report("1", (Finding("a", "ok", ""), Finding("b", "slow", "")))
    assert slow.is_well
    wrong = Report("1", (*slow.findings, Finding("c", "wrong", "x", "y")))
    assert not wrong.is_well
    body = json.loads(wrong.to_json())
    assert body["is_well"] is False
    assert body["findings"][2] == {"topic": "c", "level": "wrong", "text": "x", "remedy": "y"}


def test_what_is_shown_has_the_remedies_last():
    console = Console(file=io.StringIO(), width=60)
    findings = (
        Finding("cpu", "ok", "[fast]"),
        Finding("gpu", "slow", "old"),
        Finding("port", "wrong", "busy", "--port 0"),
    )
    show(Report("1.2", findings), console)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "npc-runtime 1.2"
    assert lines[2].split() == ["ok", "cpu", "[fast]"]
    assert lines[-1] == "    → --port 0"
    assert "What would be slow, and what to do" in lines
    console = Console(file=io.StringIO(), width=60)
    show(Report("1.2", findings[:1]), console)
    assert console.file.getvalue().splitlines()[-1] == "All is well."


def test_python_must_be_new_enough():
    assert only(check_python((3, 10, 9))).level == "wrong"
    assert only(check_python((3, 14, 0))).level == "ok"


def test_packages_that_are_missing_or_old_are_named_with_the_command():
    needed = ["numba>=0.61", "rich>=14", "numpy>=2", "peft>=0.17; extra == 'train'", "nowhere; python_version < '3'"]
    versions = {"numba": "0.60.1", "numpy": "2.4.6"}
    found = list(check_packages(needed, versions.get))
    assert levels(found) == ["wrong", "wrong", "ok"]
    assert "numba: 0.60.1 is installed, and >=0.61 is needed" in found[0].text
    assert found[0].remedy.endswith('-m pip install "numba>=0.61"')
    assert found[1].text == "rich: is missing."
    assert "1 of the right versions" in found[2].text
    assert only(check_packages([])).level == "ok"
    local = check_packages(["torch>=2.9"], lambda name: "2.13.0+cu130")
    assert only(local).level == "ok"


def test_torch_says_what_it_was_built_for():
    assert "2." in only(check_torch()).text


@pytest.mark.parametrize(
    ("tools", "level", "remedy"),
    [
        (GpuTools(False, None, None), "ok", ""),
        (GpuTools(True, None, "/usr/bin/cc", is_windows=False), "slow", "pip install triton"),
        (GpuTools(True, None, None, is_windows=True), "slow", "pip install triton-windows"),
        (GpuTools(True, "3.7.1", None, is_windows=False), "slow", "apt install gcc"),
        (GpuTools(True, "3.7.1", None, is_windows=True), "ok", ""),
        (GpuTools(True, "3.7.1", "/usr/bin/cc", is_windows=False), "ok", ""),
    ],
)
def test_triton_is_needed_on_a_gpu_alone(tools, level, remedy):
    found = only(check_gpu_tools(tools))
    assert found.level == level
    assert found.remedy.endswith(remedy)


def test_processors():
    fast = Cpu("a", "AVX512", True, 8, 7)
    assert only(check_cpu(fast, is_used=True)).level == "ok"
    plain = only(check_cpu(Cpu("a", "AVX2", False, 8, 7), is_used=True))
    assert plain.level == "slow"
    assert "half as fast" in plain.text
    assert only(check_cpu(Cpu("a", "AVX2", False, 8, 7), is_used=False)).level == "ok"
    limited = Cpu("a", "AVX2", False, 8, 7, {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert "ONEDNN_MAX_CPU_ISA=AVX2 keeps" in only(check_cpu(limited, is_used=True)).text
    few = list(check_cpu(Cpu("a", "AVX512", True, 8, 1, {"OMP_NUM_THREADS": "1"}), is_used=True))
    assert levels(few) == ["ok", "slow"]
    assert few[1].remedy == "Unset OMP_NUM_THREADS."
    assert levels(check_cpu(Cpu("a", "AVX512", True, 2, 1), is_used=True)) == ["ok", "slow"]
    assert levels(check_cpu(Cpu("a", "AVX512", True, 2, 2), is_used=True)) == ["ok"]
    assert Cpu.look().num_threads >= 1


def test_gpus():
    card = Gpu("a card", (8, 6), 20 * GB, 24 * GB)
    assert only(check_gpu(card, None, (2 * GB, 4 * GB))).level == "ok"
    assert levels(check_gpu(card, None, (19 * GB, 21 * GB))) == ["ok", "slow"]
    assert levels(check_gpu(card, None, (21 * GB, 23 * GB))) == ["ok", "wrong"]
    assert only(check_gpu(card, None, None)).text == "a card, 20.0 GB of 24.0 GB free"
    old = only(check_gpu(Gpu("old", (7, 5), GB, GB, 1), None, None))
    assert old.level == "slow"
    assert "1 more (CUDA_VISIBLE_DEVICES chooses)" in old.text
    assert only(check_gpu(None, None, None)).level == "ok"
    unused = only(check_gpu(None, ("torch cannot use it.", "pip install torch"), (GB, GB)))
    assert (unused.level, unused.remedy) == ("slow", "pip install torch")


def test_a_torch_without_cuda_beside_a_card_gets_the_command(monkeypatch):
    monkeypatch.setattr(device, "_has_nvidia_driver", lambda: True)
    unused = device.explain_unused_gpu()
    if device.torch.cuda.is_available():
        assert unused is None
    elif device.torch.version.cuda is None:
        assert unused.remedy.startswith("pip install --force-reinstall --no-deps torch==")
        assert str(unused) == f"{unused.what} {unused.remedy}"
    else:
        assert "driver" in unused.remedy


def test_memory_and_disk(tmp_path):
    assert only(check_memory(16 * GB, 8 * GB, 2 * GB)).level == "ok"
    assert only(check_memory(16 * GB, 1 * GB, 2 * GB)).level == "slow"
    assert only(check_memory(1 * GB, 1 * GB, 2 * GB)).level == "wrong"
    assert only(check_memory(1 * GB, 1 * GB, None)).level == "ok"
    assert only(check_disk(tmp_path, 2 * GB, 0)).level == "ok"
    assert only(check_disk(tmp_path, GB // 2, 0)).level == "slow"
    assert only(check_disk(tmp_path, GB // 2, GB)).level == "wrong"


def test_folders_need_not_be_there_but_must_be_writable(tmp_path):
    assert only(check_folder("cache", tmp_path / "a" / "b", "", is_vital=True)).level == "ok"
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    found = only(check_folder("cache", tmp_path / "file" / "b", "Set it.", is_vital=True))
    assert (found.level, found.remedy) == ("wrong", "Set it.")
    assert only(check_folder("log", tmp_path / "file", "", is_vital=False)).level == "slow"


def test_bases(base_folder, tmp_path):
    there = Base.find("smollm2-135m")
    assert there.folder == base_folder
    found = only(check_base("smollm2-135m", there))
    assert found.level == "ok"
    assert "538 MB in float32, its own 4-bit codes, a context of 8,192 tokens" in found.text
    missing = only(check_base("smollm2-135m", None))
    assert missing.level == "slow"
    assert "93 MB" in missing.text
    assert "npc-runtime serve --base org/x" in only(check_base("org/x", None)).remedy
    with pytest.raises(StartupError, match=r"config\.json"):
        Base.find(str(tmp_path))


def test_what_a_base_takes():
    assert SMALL.main_memory(has_bfloat16=True) < SMALL.main_memory(has_bfloat16=False)
    assert SMALL.gpu_memory()[0] == GB
    large = Base("x", None, 6 * GB, 8_192, "bfloat16", None, False)
    assert large.gpu_memory()[0] < 2 * GB  # 4 bits from a billion weights on
    packed = Base("x", None, 2 * GB, 8_192, "float16", 4, False)
    assert packed.bfloat16_bytes == 8 * GB


def test_personas_that_cannot_speak_are_told_with_their_remedy(make_persona, tmp_path):
    make_persona("guard")
    make_persona("smith", adapter="adapter")
    folder = tmp_path / "personas"
    found = list(check_personas_of(Library.load(folder), Base.find("smollm2-135m")))
    assert levels(found) == ["wrong", "ok"]
    assert "smith cannot speak" in found[0].text
    assert found[0].remedy
    assert "1 of 2 can speak" in found[1].text
    unchecked = only(check_personas_of(Library.load(folder), None))
    assert "when the base is here" in unchecked.text
    for number in range(20):
        make_persona(f"p{number}", bio="")
    many = list(check_personas_of(Library.load(folder), None))
    assert [finding.text for finding in many if "others" in finding.text] == ["nor can 12 others"]
    (tmp_path / "empty").mkdir()
    assert only(check_personas_of(Library.load(tmp_path / "empty"), None)).level == "wrong"


@pytest.mark.parametrize(
    ("endpoint", "health", "level", "words"),
    [
        (None, None, "ok", "none is running"),
        (ENDPOINT, Health("gone"), "ok", "none is running"),
        (ENDPOINT, Health("well", {"active": 3, "tokens_per_s": 12.5}), "ok", "3 lines, 12.5 tokens/s"),
        (ENDPOINT, Health("well", {}), "ok", "0 lines"),
        (ENDPOINT, Health("loading"), "ok", "process 99, port 4711 with x: it still loads"),
        (ENDPOINT, Health("ill"), "wrong", "engine has ended"),
        (ENDPOINT, Health("silent"), "wrong", "process 99, port 4711: it does not answer"),
    ],
)
def test_the_daemon_that_runs(endpoint, health, level, words):
    found = only(check_daemon(endpoint, health))
    assert found.level == level
    assert words in found.text
    assert (level == "ok") == (not found.remedy)


def test_a_daemon_that_is_starting_is_known_by_its_lock():
    assert only(check_daemon(None, None, 99)).text == "process 99 is starting for this project"


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = only(check_port(port))
        assert found.level == "wrong"
        assert "--port 0" in found.remedy
    assert only(check_port(port)).level == "ok"


def run(*arguments, **environment):
    command = [sys.executable, "-P", "-m", "npc_runtime", "doctor", *arguments]
    settings = {"capture_output": True, "text": True, "timeout": 120, "env": {**os.environ, **environment}}
    return subprocess.run(command, **settings)


def test_this_machine(make_persona, tmp_path):
    make_persona("guard")
    done = run("--json", "--personas", str(tmp_path / "personas"), XDG_RUNTIME_DIR=str(tmp_path))
    body = json.loads(done.stdout)
    topics = {finding["topic"] for finding in body["findings"]}
    assert topics == {
        *("python", "packages", "torch", "triton", "gpu", "cpu", "memory", "base", "personas", "daemon", "port"),
        *("folders", "disk"),
    }
    wrong = {finding["topic"] for finding in body["findings"] if finding["level"] == "wrong"}
    assert wrong <= {"port"}  # somebody's daemon may run here
    assert done.returncode == (1 if wrong else 0)
    assert "could not be looked at" not in done.stdout


def test_everything_wrong_at_once_is_still_no_traceback(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(
        "--base", "smollm2-135", "--personas", str(tmp_path / "nowhere"), NPC_RUNTIME_CACHE=str(tmp_path / "file")
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "Did you mean smollm2-135m?" in done.stdout
    for words in ("no such folder", "cannot be written", "What is wrong, and what to do"):
        assert words in " ".join(done.stdout.split())


def test_a_torch_that_cannot_be_imported_is_a_finding(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run("--json", PYTHONPATH=path)
    assert done.returncode == 1, done.stderr
    found = {finding["topic"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert "libcudart.so.13" in found["torch"]["text"]
    assert found["base"]["level"] == "ok"
