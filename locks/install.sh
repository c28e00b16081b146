#!/bin/sh
# How does a virtual environment come to hold exactly what was tested?
#
#     sh locks/install.sh VENV LOCK...          e.g. sh locks/install.sh .venv build test
#
# Every package comes from the lock files of the names given, with its hash. With `build` among them, tierway itself is
# installed too, editable. Rules to keep:
#
# * The stamp is written last and names what it stands for, so a stamp that is there can be believed.
# * What was interrupted is thrown away whole: half a package cannot be told from a whole one.
# * Needs a POSIX shell and what every Debian has; no system package, no compiler.
set -eu
cd "$(dirname "$0")/.."

venv=$1
shift
goals=$*
files=
for lock in $goals; do files="$files locks/$lock.txt"; done

say() { printf '%s\n' "$*"; }
die() {
    printf 'tierway: %s\n' "$*" >&2
    exit 1
}

# Two makes in one checkout take turns. The lock is on this very file, so there is none to leave behind.
if command -v flock >/dev/null 2>&1; then
    exec 9<locks/install.sh
    flock -n 9 || {
        say "Waiting for another install in this folder to finish ..."
        flock 9
    }
fi

# The sum is over all locks, not only those asked for: what another goal installed since would make a stamp untrue.
sum=$(cat locks/install.sh pyproject.toml locks/*.txt | cksum | tr ' ' '-')
stamp="$venv/.has-$(printf '%s' "$goals" | tr ' ' '+')-of-$sum"

# Scripts in a virtual environment carry its absolute path: one that was copied or moved is not used.
home="$PWD/$venv"
version_of() { "$1" -c 'import sys; print(sys.version)' 2>/dev/null || echo none; }
usable() {
    [ "$(cat "$venv/.home" 2>/dev/null)" = "$home" ] || return 1
    "$venv/bin/python" -c 'import pip' 2>/dev/null || return 1
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$venv/bin/python")" ]
}

if [ -f "$stamp" ] && [ ! -f "$venv/.installing" ] && usable; then exit 0; fi

# The first interpreter that is new enough and can make virtual environments; else the first obstacle, in one line.
find_python() {
    obstacle=
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            obstacle=${obstacle:-"Python 3.11 or newer is needed and $candidate is $version; name another one: make PYTHON=/path/to/python3"}
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            missing=${missing:-"$candidate has no venv module; on Debian and Ubuntu: apt-get install python$version-venv (or python3-venv)"}
        else
            python=$candidate
            return 0
        fi
    done
    die "${missing:-${obstacle:-"no ${PYTHON:-python3} found; Python 3.11 or newer is needed (make PYTHON=/path/to/python3)"}}"
}

if [ -f "$venv/.installing" ] || ! usable; then
    find_python
    if [ -f "$venv/.installing" ]; then
        say "The last install was interrupted; starting it again."
    elif [ -d "$venv" ]; then
        say "$venv does not work here (moved, unfinished, or of another Python); making it again."
    fi
    rm -rf "$venv"
    say "Making $venv with Python $version ..."
    "$python" -m venv "$venv" || die "making $venv failed; what Python said is above"
    echo '*' >"$venv/.gitignore"
    printf '%s\n' "$home" >"$venv/.home"
fi

count=$(cat $files | grep '^[a-z0-9]' | cut -d= -f1 | sort -u | wc -l)
say "Installing what is in$files (about $((count)) packages; only the first time takes long) ..."
: >"$venv/.installing"
requirements=
for file in $files; do requirements="$requirements -r $file"; done
pip="$venv/bin/python -m pip --disable-pip-version-check --no-input -q"
# A lock is complete, so what packages say of each other need not be asked again.
$pip install --no-deps --require-hashes $requirements || die "installing failed; what pip said is above. Run make again to go on"
case " $goals " in
*" build "*)
    # hatchling comes from the lock as well, so nothing is fetched for the build.
    $pip install --no-deps --no-build-isolation -e . || die "installing tierway itself failed; what pip said is above"
    ;;
esac
for old in "$venv"/.has-*; do
    case $old in *"-of-$sum") ;; *) rm -f "$old" ;; esac
done
: >"$stamp"
rm -f "$venv/.installing"
say "Installed."
