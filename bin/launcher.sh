# What all programs in bin/ and tools/ begin with: they include it, from any folder and through symbolic links.
root=$(dirname "$(dirname "$(readlink -f "$0")")")
unset PYTHONPATH PYTHONHOME PYTHONSAFEPATH VIRTUAL_ENV # those of another environment would shadow ours
true >&2 || exec 2>/dev/null # a closed stderr would be the next file that a program opens

# run PROGRAM ARGUMENTS...: become a program of .venv
run() {
    program=$root/.venv/bin/$1
    shift
    if [ ! -x "$program" ]; then
        echo "${0##*/}: run bin/setup first" >&2
        exit 1
    fi
    exec "$program" "$@"
}
