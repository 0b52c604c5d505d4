"""`completion`: what completes the command `hpctrain` in a shell, made from the help."""

from __future__ import annotations

from hpctrain.cli.usage import USAGES, Parser, options_of
from hpctrain.errors import ExitCode
from hpctrain.utils.streams import write_out

_TOOLS = {
    "data": ("pack", "info", "index", "verify", "stats", "split", "repack", "bench"),
    "ckpt": ("ls", "verify", "diff", "export"),
    "completion": ("bash", "zsh", "fish"),
}
"""What a command takes as its first word, beside options and files."""

_BASH = """\
# Completes hpctrain in bash. Source it, or put it where bash-completion looks:
#   hpctrain completion bash >~/.local/share/bash-completion/completions/hpctrain
_hpctrain() {
  local word=${COMP_WORDS[COMP_CWORD]} command=${COMP_WORDS[1]-} words=
  if ((COMP_CWORD == 1)); then
    words="@COMMANDS@ @OPTIONS@"
  else
    case $command in
@CASES@
      *) words="@OPTIONS@" ;;
    esac
  fi
  COMPREPLY=()
  [[ -z $word && COMP_CWORD -gt 1 ]] || mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
  [[ $word == -* ]] || mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -f -- "$word")
}
complete -o filenames -F _hpctrain hpctrain
"""

_ZSH = """\
#compdef hpctrain
# Completes hpctrain in zsh. Put it as _hpctrain in a folder of $fpath.
_hpctrain() {
  local -a words
  if ((CURRENT == 2)); then
    words=(@COMMANDS@ @OPTIONS@)
  else
    case ${${(z)BUFFER}[2]} in
@CASES@
      *) words=(@OPTIONS@) ;;
    esac
  fi
  compadd -- $words
  _files
}
_hpctrain "$@"
"""


def completion(arguments: list[str]) -> int:
    """Print a script of completion."""
    parser = Parser("completion")
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])
    shell = parser.parse_args(arguments).shell
    write_out({"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]())
    return ExitCode.DONE


def words_of(command: str) -> list[str]:
    """Return what may follow a command, beside files."""
    return [*_TOOLS.get(command, ()), *options_of(command)]


def _filled(template: str, case: str) -> str:
    commands = [command for command in USAGES if command]
    cases = "\n".join(
        case.replace("@NAME@", command).replace("@WORDS@", " ".join(words_of(command)))
        for command in commands
    )
    options = " ".join(options_of(""))
    text = template.replace("@COMMANDS@", " ".join(commands)).replace("@CASES@", cases)
    return text.replace("@OPTIONS@", options)


def _bash() -> str:
    return _filled(_BASH, '      @NAME@) words="@WORDS@" ;;')


def _zsh() -> str:
    return _filled(_ZSH, "      @NAME@) words=(@WORDS@) ;;")


def _fish() -> str:
    commands = [command for command in USAGES if command]
    lines = [
        "# Completes hpctrain in fish. Put it into ~/.config/fish/completions/hpctrain.fish.",
        f"complete -c hpctrain -n __fish_use_subcommand -a '{' '.join(commands)}'",
    ]
    for command in commands:
        seen = f"__fish_seen_subcommand_from {command}"
        for word in words_of(command):
            asked = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            lines.append(f"complete -c hpctrain -n '{seen}' {asked}")
    return "\n".join(lines) + "\n"
