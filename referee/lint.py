"""Source lint over every readable layer of the program: loading that runs code, network, training data, binaries."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable

from referee.folder import Submission
from referee.model import Check, Finding, failed, many, not_checkable, passed
from referee.unpack import Layer, dotted

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
NETWORK_MODULES = {
    "requests", "httpx", "aiohttp", "socket", "ftplib", "smtplib", "http.client", "urllib.request", "urllib3", "boto3",
    "paramiko", "wandb", "gdown",
}  # fmt: skip
NETWORK_CALLS = {
    "hf_hub_download",
    "snapshot_download",
    "load_dataset",
    "urlopen",
    "urlretrieve",
    "load_state_dict_from_url",
}
# Programs that only describe the machine or the checkout.
HARMLESS_PROGRAMS = {"nvidia-smi", "git", "lscpu", "uname", "hostname"}
# What the challenge's own image has (its requirements.txt), by import name.
BASE_PACKAGES = {
    "numpy", "tqdm", "torch", "huggingface_hub", "kernels", "setuptools", "typing_extensions", "datasets", "tiktoken",
    "sentencepiece", "triton",
}  # fmt: skip
IMPORT_OF = {"flash_attn_interface": ("flash_attn_3", "flash_attn"), "PIL": ("pillow",), "yaml": ("pyyaml",)}
TRAIN_DATA = re.compile(r"train_(files|shards?|loader|pattern|data|stream|tokens_path)$|_train_|train_\*|trainloader")
SCORES = re.compile(r"(^|_)(eval|evaluate|score|scoring|sliding|ttt|validate|val|temperature|temp|calibrate_t)(_|$)")
TRAINS = ("backward",)
# Functions of the C library that load code or start programs behind Python's back.
OF_LIBC = {"dlopen", "dlmopen", "system", "popen", "execv", "execve", "execvp", "posix_spawn", "fexecve"}
STARTERS = {
    "subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call", "subprocess.check_output",
    "subprocess.getoutput", "subprocess.getstatusoutput", "os.system", "os.popen",
}  # fmt: skip


def at(layer: Layer, node: ast.AST) -> str:
    return f"{layer.name}:{getattr(node, 'lineno', '?')}"


def imported_modules(layer: Layer) -> list[tuple[ast.stmt, str]]:
    found: list[tuple[ast.stmt, str]] = []
    for node in layer.nodes:
        if isinstance(node, ast.Import):
            found += [(node, item.name) for item in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [(node, node.module)]
    return found


def clean(submission: Submission, found: str) -> list[Finding]:
    """What a lint that found nothing says: that it passed, unless there is source that it could not read."""
    if submission.unparsed or not submission.layers:
        return [not_checkable(why) for why in submission.unparsed] or [not_checkable("no program that can be read")]
    if submission.closed:
        return [not_checkable("part of the program is packed and could not be opened; see staged.compiled")]
    return [passed(found)]


def check_compiled(submission: Submission) -> list[Finding]:
    if submission.entry is None:
        return [not_checkable("no program that trains was found")]
    mend = "pack with lzma, zlib or brotli of one literal, so that anyone can unpack and read it without running it"
    findings = [failed(why, submission.entry, mend) for why in submission.closed]
    for layer in submission.layers:
        try:
            compile(layer.tree, layer.name, "exec")
        except (SyntaxError, ValueError) as error:
            findings.append(failed(f"does not compile: {error}", layer.name, "mend the syntax"))
    findings += [not_checkable(f"{why}; run the referee with a newer Python") for why in submission.unparsed]
    depth = f", {len(submission.layers) - 1} packed inside" if len(submission.layers) > 1 else ""
    return findings or [passed(f"the program compiles{depth}", submission.entry)]


def required_names(text: str) -> set[str]:
    """Packages of a requirements.txt, as import names are spelled; commented pins are optional packages."""
    names = set()
    for line in text.splitlines():
        stripped = line.strip().lstrip("#").strip()
        match = re.match(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[.*?\])?\s*([=<>~!@;].*)?$", stripped)
        if match:
            names.add(match.group(1).lower().replace("-", "_").replace(".", "_"))
    return names


def declares(papers: str, names: Iterable[str]) -> bool:
    """Whether a line of the papers that installs something names one of the packages."""
    lines = [line.lower().replace("-", "_") for line in papers.splitlines() if "install" in line.lower()]
    return any(re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", line) for name in names for line in lines)


def papers_of(submission: Submission) -> str:
    """requirements.txt and README.md in one text."""
    return (submission.requirements or "") + "\n".join(
        (submission.root / fact.path).read_text(encoding="utf-8", errors="replace")
        for fact in submission.files
        if fact.name.lower() == "readme.md"
    )


def check_imports(submission: Submission) -> list[Finding]:
    known, papers = BASE_PACKAGES | required_names(submission.requirements or ""), papers_of(submission)
    own = {fact.path.split("/")[0].removesuffix(".py") for fact in submission.files if fact.path.endswith(".py")}
    findings: list[Finding] = []
    seen: set[str] = set()
    for layer in submission.layers:
        for node, module in imported_modules(layer):
            root = module.split(".")[0]
            if root in sys.stdlib_module_names or root in own or root in seen:
                continue  # files beside the program are the matter of bytes.siblings
            seen.add(root)
            names = {root.lower(), *IMPORT_OF.get(root, ())}
            if not names & known and not declares(papers, names):
                mend = "add it to requirements.txt with its version, or bring its code into the program"
                found = f"imports {root}, which neither the challenge's image, requirements.txt nor README.md has"
                findings.append(failed(found, at(layer, node), mend))
    return findings or clean(
        submission, f"{many(len(seen), 'package')}, all in the challenge's image or in requirements.txt"
    )


def check_loading(submission: Submission) -> list[Finding]:
    findings: list[Finding] = []
    for layer in submission.layers:
        wrapper = len(submission.layers) > 1 and layer is not submission.layers[-1]
        for node, name in layer.calls:
            options = {k.arg: k.value for k in node.keywords}
            said = options.get("weights_only")
            last = name.split(".")[-1]
            if name in ("torch.load", "torch.jit.load") and not (
                name == "torch.load" and isinstance(said, ast.Constant) and said.value is True
            ):
                mend = "torch.load(..., weights_only=True), or a format of plain arrays"
                findings.append(failed(f"{name} unpickles: a file can run code", at(layer, node), mend))
            if name.split(".")[0] in UNPICKLERS and last in ("load", "loads", "Unpickler", "open"):
                findings.append(failed(f"{name} runs code from data", at(layer, node), "store plain arrays and JSON"))
            allow = options.get("allow_pickle")
            if isinstance(allow, ast.Constant) and allow.value is True:
                findings.append(failed(f"{name} with allow_pickle=True", at(layer, node), "allow_pickle=False"))
            if name in ("exec", "eval", "builtins.exec", "builtins.eval") and not (
                wrapper or submission.closed or submission.unparsed
            ):
                findings.append(failed(f"{name} of text", at(layer, node), "write the code as code"))
    return findings or clean(submission, "nothing loads data that can run code")


def check_network(submission: Submission) -> list[Finding]:
    findings: list[Finding] = []
    mend = "bring the data before the run; training and evaluation have no network"
    for layer in submission.layers:
        for node, module in imported_modules(layer):
            if module in NETWORK_MODULES or module.split(".")[0] in NETWORK_MODULES:
                findings.append(failed(f"imports {module}", at(layer, node), mend))
        for node, name in layer.calls:
            if name.split(".")[-1] in NETWORK_CALLS:
                findings.append(failed(f"calls {name}", at(layer, node), mend))
    return findings or clean(submission, "nothing opens a network connection")


def started_program(node: ast.Call, name: str) -> str | None:
    """The program that a call starts, '?' if its name is computed; None if the call starts none."""
    if name.startswith(("os.spawn", "os.posix_spawn")):
        arguments = node.args[1:] if name.startswith("os.spawn") else node.args
    elif name in STARTERS or name.startswith("os.exec"):
        arguments = node.args
    else:
        return None
    first = arguments[0] if arguments else next((k.value for k in node.keywords if k.arg == "args"), None)
    if isinstance(first, (ast.List, ast.Tuple)) and first.elts:
        first = first.elts[0]
    if isinstance(first, ast.Constant) and isinstance(first.value, str) and first.value.strip():
        return first.value.split()[0].split("/")[-1]
    return "?"


def opens_itself(node: ast.Call) -> bool:
    """CDLL(None): the process with the C library that it has anyway, no file."""
    return len(node.args) == 1 and isinstance(node.args[0], ast.Constant) and node.args[0].value is None


def check_binaries(submission: Submission) -> list[Finding]:
    findings: list[Finding] = []
    papers = papers_of(submission)
    for layer in submission.layers:
        itself = any(opens_itself(node) and name.split(".")[-1] == "CDLL" for node, name in layer.calls)
        for node, name in layer.calls:
            program = started_program(node, name)
            if program is not None and program not in HARMLESS_PROGRAMS:
                if program != "?" and program in papers:
                    findings.append(passed(f"starts {program}, which the papers declare", at(layer, node)))
                else:
                    mend = "declare it in README.md or requirements.txt, or do without it"
                    shown = program if program != "?" else "a program whose name is computed"
                    findings.append(failed(f"starts {shown}", at(layer, node), mend))
            native = name.split(".")[-1] in ("CDLL", "LoadLibrary", "load_library") and not opens_itself(node)
            if native or ("cpp_extension" in name and name.split(".")[-1] in ("load", "load_inline")):
                mend = "ship kernels as Triton source in the program, or use a public package"
                findings.append(failed(f"{name} loads native code", at(layer, node), mend))
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if itself and called in OF_LIBC and name.split(".")[0] not in ("os", "platform"):
                mend = "use what Python offers, so that it can be seen"
                findings.append(failed(f"calls the C library's {called}", at(layer, node), mend))
    return findings or clean(submission, "starts no undeclared program and loads no native code")


def mentions_training_data(node: ast.AST) -> ast.AST | None:
    for inner in ast.walk(node):
        if isinstance(inner, (ast.Name, ast.Attribute)):
            name = inner.id if isinstance(inner, ast.Name) else inner.attr
            if TRAIN_DATA.search(name):
                return inner
        text = inner.value if isinstance(inner, ast.Constant) else None
        if isinstance(text, str) and "_train_" in text and len(text) < 80 and not any(c.isspace() for c in text):
            return inner
    return None


def has_training_loop(function: ast.AST) -> bool:
    loops = (node for node in ast.walk(function) if isinstance(node, (ast.For, ast.While)))
    return any(
        isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in TRAINS
        for loop in loops
        for n in ast.walk(loop)
    )


def check_training_data(submission: Submission) -> list[Finding]:
    """Training data named in a function that scores, or handed to one after the training loop of the same function."""
    findings: list[Finding] = []
    mend = "calibrate inside the training clock and ship the result; evaluation reads validation data only"
    for layer in submission.layers:
        for function in layer.nodes:
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if SCORES.search(function.name) and "train" not in function.name:
                place = next((hit for s in function.body if (hit := mentions_training_data(s)) is not None), None)
                if place is not None:
                    shown = ast.unparse(place)[:40]
                    findings.append(failed(f"{function.name} reads `{shown}`", at(layer, place), mend))
            ended = [
                i for i, s in enumerate(function.body) if isinstance(s, (ast.For, ast.While)) and has_training_loop(s)
            ]
            tainted: set[str] = set()
            for statement in function.body[ended[-1] + 1 :] if ended else []:
                for node in ast.walk(statement):
                    if isinstance(node, ast.Assign) and mentions_training_data(node.value) is not None:
                        tainted |= {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
                    if not isinstance(node, ast.Call):
                        continue
                    name = dotted(node.func).split(".")[-1]
                    given = [*node.args, *(k.value for k in node.keywords)]
                    hit = any(mentions_training_data(a) is not None for a in given) or any(
                        isinstance(n, ast.Name) and n.id in tainted for a in given for n in ast.walk(a)
                    )
                    if hit and SCORES.search(name):
                        findings.append(failed(f"{name} gets training data after training", at(layer, node), mend))
    return findings or clean(submission, "no function that scores reads training data")


CHECKS = (
    Check("lint.loading", "nothing is loaded that can run code", check_loading),
    Check("lint.network", "no network call in training or evaluation", check_network),
    Check("lint.training_data", "evaluation reads no training data", check_training_data),
    Check("lint.binaries", "no undeclared program is started, no native code is loaded", check_binaries),
)
STAGED = (
    Check("staged.compiled", "the program compiles, and what is packed can be read without running it", check_compiled),
    Check(
        "staged.imports",
        "every import is in the standard library, the challenge's image or requirements.txt",
        check_imports,
    ),
)
