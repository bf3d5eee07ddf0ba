# Sourced by the programs in this directory: the checkout's own virtual environment.
#
# `venv EXTRA` (test, bench, embedded or none) makes $root/.venv once and installs the project into it, editable, again only
# when setup.cfg or pyproject.toml changed. One run at a time does so; a finished environment is only read, so a
# checkout that somebody else prepared need not be writable. $PYTHON names the interpreter to make it from.

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
venv=$root/.venv

fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

venv() {
    PYTHON=${PYTHON:-python3}
    # A copied or moved checkout and another interpreter need another environment.
    origin=$("$PYTHON" -c 'import sys
print(sys.version_info[:2] >= (3, 11), sys.version_info[:2], sys.base_prefix)' 2>/dev/null) ||
        fail "needs Python 3.11 or newer, and cannot run $PYTHON (set PYTHON to another one)"
    case $origin in
        True*) origin="$origin $root" ;;
        *) fail "needs Python 3.11 or newer, $PYTHON is older (set PYTHON to another one)" ;;
    esac
    wanted=$(cat "$root/setup.cfg" "$root/pyproject.toml" | cksum)
    ready "$1" && return
    test -w "$root" || fail "cannot write to $root, where its virtual environment .venv belongs"
    (
        # The lock belongs to the open file, so it stays with this subshell when Python ends.
        "$PYTHON" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
        ready "$1" || build "$1"
    ) 9>"$root/.venv.lock" || exit 1
}

ready() {
    same "$venv/pgtask-origin" "$origin" || return 1
    # What has the test extra has everything, and any has what nothing more is asked of.
    same "$venv/pgtask-$1" "$wanted" || same "$venv/pgtask-test" "$wanted" && return
    test "$1" = none && same "$venv/pgtask-embedded" "$wanted"
}

same() {
    test -r "$1" && test "$(cat "$1")" = "$2"
}

build() {
    if ! same "$venv/pgtask-origin" "$origin"; then
        echo "${0##*/}: making $venv" >&2
        rm -rf "$venv"
        "$PYTHON" -m venv "$venv" || fail "cannot make $venv (on Debian, is python3-venv installed?)"
        printf '%s\n' "$origin" >"$venv/pgtask-origin"
    fi
    echo "${0##*/}: installing pgtask ($1) into $venv" >&2
    case $1 in
        none) extra= ;;
        *) extra="[$1]" ;;
    esac
    (cd "$root" && "$venv/bin/python" -m pip install -q --disable-pip-version-check -e ".$extra") ||
        fail "pip could not install pgtask into $venv"
    printf '%s\n' "$wanted" >"$venv/pgtask-$1"
}
