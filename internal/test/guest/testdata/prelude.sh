# What the scripts of guests share. A command that fails ends the script.

set -E
trap 'echo "FAIL: $BASH_COMMAND"' ERR

fail() { echo "FAIL: $*"; exit 1; }

# refused WORD... -- COMMAND...: it fails, and says each WORD.
refused() {
    local words=() text
    while [ "$1" != -- ]; do words+=("$1"); shift; done
    shift
    if text=$("$@" 2>&1); then fail "$* succeeds: $text"; fi
    for w in "${words[@]}"; do
        [[ $text == *"$w"* ]] || fail "$*: no '$w' in: $text"
    done
}

# eventually COMMAND...: it succeeds within half a minute.
eventually() {
    local i
    for ((i = 0; i < 300; i++)); do
        if "$@" 2>/dev/null; then return; fi
        sleep 0.1
    done
    fail "never: $*"
}

absent() { [ ! -e "$1" ]; }
gone() { ! kill -0 -- "$1"; }

# nodes DEVICE NUMBER...: it has partitions of these numbers and no others.
nodes() {
    local dev=$1 have want=
    shift
    have=$(cd /dev && echo "${dev##*/}"p*)
    for n; do want+=" ${dev##*/}p$n"; done
    want=${want# }
    [ "$have" = "${want:-${dev##*/}p*}" ] || fail "$dev has $have, not $want"
    for n; do [ -b "${dev}p$n" ] || fail "${dev}p$n is no block device"; done
}

# free DEVICE: nothing is attached, and nothing is left of what was.
free() {
    local sys=/sys/block/${1##*/}
    [ ! -e "$sys/pid" ] || fail "$1 is attached"
    [ "$(cat "$sys/size")" = 0 ] || fail "$1 has a size"
    [ ! -e "/run/imgnbd/${1##*/}.json" ] || fail "$1 has a server"
    nodes "$1"
}

# guardians N: so many servers have one.
guardians() { [ "$(pgrep -cx nbd-guardian || true)" = "$1" ]; }

server() { sed -E 's/.*"pid":([0-9]+).*/\1/' "/run/imgnbd/${1##*/}.json"; }

# fill DIR KIND: files with checksums.
fill() {
    mkdir "$1/dir"
    head -c 3M /dev/urandom >"$1/random"
    seq 300000 >"$1/text"
    truncate -s 40M "$1/sparse"
    echo end >>"$1/sparse"
    for i in $(seq 100); do echo "$i" >"$1/dir/$i"; done
    (cd "$1" && md5sum random text sparse dir/* >sums)
}
verify() { (cd "$1" && md5sum --quiet -c sums) || fail "$1: contents"; }
