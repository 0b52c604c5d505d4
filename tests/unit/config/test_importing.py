"""Import paths, found without importing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hpctrain.config.importing import is_reference, problem_of

MODULES = {
    "mine.py": """
import os.path
import os.path as path_module
from json import loads as read, dumps
class Net: pass
def build(): private = 1
async def later(): pass
a, (b, *c) = 1, (2, 3)
d: int = 1
e = f = 0
if os.sep == "/":
    class Conditional: pass
else:
    other = 1
try:
    import nothing_of_this_name
except ImportError as problem:
    nothing_of_this_name = None
    class Fallback: pass
with open(os.devnull) as stream:
    inside = 1
for item in []:
    looped = 1
while False:
    never = 1
if (walrus := 1): pass
def setter():
    global set_globally
    set_globally = 1
raise RuntimeError("a module is not run to look into it")
""",
    "starred.py": "from json import *\n",
    "lazy.py": "def __getattr__(name): raise AttributeError(name)\n",
    "dynamic.py": "globals()['Net'] = 1\n",
    "replaced.py": "import sys\nsys.modules[__name__] = object()\n",
    "broken.py": "\nclass Net(:\n",
    "odd_escape.py": "Net = '\\d'\n",
    "not_text.py": "\xff",
    "package/__init__.py": "from package.inner import Net\n",
    "package/inner.py": "Net = 1\n",
    "plain_folder/inner.py": "Net = 1\n",
    "plain_folder/deeper/inner.py": "Net = 1\n",
    "package/folder/inner.py": "Net = 1\n",
    "json/readme.txt": "",
}


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in MODULES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text, encoding="latin-1")


@pytest.mark.parametrize(
    "reference",
    [
        *(f"mine:{name}" for name in ("Net", "build", "later", "a", "b", "c", "d", "e", "f")),
        *(f"mine:{name}" for name in ("os", "path_module", "read", "dumps", "Conditional")),
        *(f"mine:{name}" for name in ("other", "nothing_of_this_name", "Fallback", "stream")),
        *(f"mine:{name}" for name in ("inside", "item", "looped", "never", "walrus")),
        "mine:set_globally",
        "mine:Net.method",
        "starred:anything",
        "lazy:anything",
        "dynamic:Net",
        "replaced:anything",
        "odd_escape:Net",
        "package:Net",
        "package.inner:Net",
        "plain_folder.inner:Net",
        "plain_folder.deeper.inner:Net",
        "package.folder.inner:Net",
        "json:JSONDecoder",  # not the folder of that name
        "math:sqrt",  # an extension or built-in module
        "sys:exit",
        "os.path:join",
        "pydantic:BaseModel",
    ],
)
def test_found_or_undecided(reference: str) -> None:
    before = set(sys.modules)
    assert problem_of(reference) is None
    assert not {name for name in set(sys.modules) - before if name in ("mine", "package")}


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("mine:Nt", "module 'mine' has no 'Nt'; did you mean Net?"),
        ("mine:private", "module 'mine' has no 'private'"),
        ("mne:Net", "the current directory and Python have no module 'mne'; did you mean mine?"),
        ("qqqq:Net", "the current directory and Python have no module 'qqqq'"),
        ("mine.inner:Net", "'mine' is a module, not a package with modules in it"),
        ("package.iner:Net", "package 'package' has no module 'iner'; did you mean package.inner?"),
        ("package.inner.more:Net", "'package.inner' is a module, not a package with modules in it"),
        ("plain_folder:Net", "module 'plain_folder' has no 'Net'"),
        (
            "package.folder.iner:Net",
            "package 'package.folder' has no module 'iner'; did you mean package.folder.inner?",
        ),
    ],
)
def test_not_there(reference: str, expected: str) -> None:
    assert problem_of(reference) == expected


@pytest.mark.parametrize(("module", "line"), [("broken", 2), ("not_text", 1)])
def test_a_module_that_is_no_python_is_told_with_its_line(module: str, line: int) -> None:
    problem = problem_of(f"{module}:Net")
    assert problem is not None
    assert problem.startswith(f"{Path.cwd()}/{module}.py, line {line}: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:b", True),
        ("a.b_1:C.d", True),
        ("ä:ö", True),
        ("a", False),
        ("a.b", False),
        (":b", False),
        ("a:", False),
        ("a:b:c", False),
        ("a..b:c", False),
        ("1a:b", False),
        ("a/b:c", False),
        ("a: b", False),
        ("", False),
    ],
)
def test_is_reference(text: str, expected: bool) -> None:
    assert is_reference(text) is expected
