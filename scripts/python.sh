# Sourced: find_python prints the Python that the environment is made with, or says what to install.

TESTED=3.11 # the one that constraints/*.txt were resolved for

_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

find_python() { # $PYTHON, else python3.11, else a python3 of that version
    local candidate version lacks_venv="" seen=""
    if [ -n "${PYTHON:-}" ]; then
        version=$(_version "$PYTHON") || { echo "PYTHON is '$PYTHON', which does not run" >&2; return 1; }
        case "$version" in 2.* | 3.? | 3.10)
            echo "PYTHON is '$PYTHON', Python $version: $TESTED is needed" >&2
            return 1 ;;
        esac
        [ "$version" = "$TESTED" ] ||
            echo "PYTHON is '$PYTHON', Python $version: taken as you ask, tested with $TESTED alone" >&2
        echo "$PYTHON"
        return
    fi
    for candidate in "python$TESTED" python3 python; do
        version=$(_version "$candidate") || continue
        if [ "$version" != "$TESTED" ]; then
            seen="${seen:+$seen, }$candidate is $version"
        elif "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        else
            lacks_venv=$candidate
        fi
    done
    if [ -n "$lacks_venv" ]; then
        echo "$lacks_venv cannot make virtual environments: apt-get install python$TESTED-venv" >&2
        return 1
    fi
    cat >&2 <<MESSAGE
Python $TESTED is needed and was not found${seen:+ ($seen)}. Install it in one of these ways, then run this again:
    apt-get install python$TESTED python$TESTED-venv     # Debian 12; Ubuntu: with ppa:deadsnakes/ppa
    dnf install python$TESTED                           # Red Hat, Rocky, Fedora
    uv python install $TESTED                           # anywhere; likewise conda create -n py311 python=$TESTED
One that is not on the PATH: PYTHON=/path/to/python$TESTED make setup
MESSAGE
    return 1
}
