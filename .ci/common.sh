# Shared by the scripts beside it: packages, the tools of QEMU 5.2, and leaving nothing behind.
# Sourced from the root of the repository with `set -euo pipefail`.

# With the minutes since the script began.
say() { printf '\n== %s [%d:%02d]\n' "$*" $((SECONDS / 60)) $((SECONDS % 60)); }

as_root() {
    if [[ $(id -u) == 0 ]]; then "$@"; else sudo "$@"; fi
}

apt_updated=
apt_install() {
    if [[ -z $apt_updated ]]; then
        as_root apt-get -q update
        apt_updated=yes
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "$@"
}

# need PROGRAM PACKAGE...: installs the packages unless the program is there.
need() {
    local program=$1
    shift
    PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || apt_install "$@"
}

# Nothing for a package that is not there.
installed_version() { { dpkg-query -W -f='${Status} ${Version}' "$1" 2>/dev/null || true; } | sed -n 's/^install ok installed //p'; }

# qemu-img and its iscsi driver must be of one release. A machine may carry a newer qemu-utils from elsewhere, for which
# there is no qemu-block-extra: then both go to the version that qemu-block-extra has.
need_qemu_iscsi() {
    local utils extra version
    utils=$(installed_version qemu-utils)
    extra=$(installed_version qemu-block-extra)
    if [[ -n $utils && $utils == "$extra" ]]; then return; fi
    if [[ -z $apt_updated ]]; then
        as_root apt-get -q update
        apt_updated=yes
    fi
    version=$(apt-cache policy qemu-block-extra | sed -n 's/^ *Candidate: *//p')
    apt_install --allow-downgrades "qemu-utils=$version" "qemu-block-extra=$version"
}

# need_space GIB: ends here, rather than in a linker without words, where the build directory or the tests' have less.
need_space() {
    local directory free
    for directory in "${CARGO_TARGET_DIR:-.}" "${TMPDIR:-/tmp}"; do
        mkdir -p "$directory"
        free=$(df --output=avail -B1G "$directory" | tail -n 1)
        if ((free < $1)); then
            echo "$directory has $((free)) GiB free, and this needs $1: make room, or set CARGO_TARGET_DIR and TMPDIR" >&2
            exit 1
        fi
    done
}

need_rust() {
    if ! command -v cargo >/dev/null; then
        echo "cargo is missing: install Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or newer (https://rustup.rs)" >&2
        exit 1
    fi
    need cc gcc libc6-dev
}

# Sets QEMU52_DIR to the programs of QEMU 5.2 with the native driver, building them where their builder lies beside the
# checkout: the tools, and with the word `system` the emulator too. Leaves it empty where they cannot be had.
find_qemu52() {
    local builder=../shared/tools/qemu-5.2-sheepdog
    local cached=${XDG_CACHE_HOME:-$HOME/.cache}/qemu-5.2-sheepdog/bin
    local wanted=qemu-img
    [[ ${1:-} != system ]] || wanted=qemu-system-x86_64
    if [[ -z ${QEMU52_DIR:-} ]]; then
        if [[ -x $cached/$wanted ]]; then
            QEMU52_DIR=$cached
        elif [[ -x $builder ]]; then
            say "building QEMU 5.2 (once; 4 minutes for the tools, 7 with the emulator)"
            need xz xz-utils
            need bzip2 bzip2
            QEMU52_DIR=$("$builder" "$@" | tail -n 1) || { echo "that failed (see $cached/../build.log)" >&2; QEMU52_DIR=; }
        fi
    fi
    export QEMU52_DIR=${QEMU52_DIR:-}
}

# Sets GUEST_DIR to a kernel, its virtio modules and a busybox for the guests of the tests, taken out of Debian's packages.
find_guest() {
    local directory=${XDG_CACHE_HOME:-$HOME/.cache}/sheep-guest
    export GUEST_DIR=${GUEST_DIR:-$directory}
    [[ ! -e $GUEST_DIR/vmlinuz ]] || return 0
    need busybox busybox-static
    [[ -d /usr/share/seabios ]] || apt_install seabios qemu-system-data
    local unpacked kernel module
    unpacked=$(mktemp -d)
    [[ -n $apt_updated ]] || { as_root apt-get -q update; apt_updated=yes; }
    kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: *\(linux-image-[^ ]*\)$/\1/p' | head -n 1)
    (cd "$unpacked" && apt-get -q download "$kernel" && dpkg-deb -x "$kernel"_*.deb .)
    mkdir -p "$GUEST_DIR"
    cp "$(command -v busybox)" "$GUEST_DIR/busybox"
    for module in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk; do
        cp "$(find "$unpacked/lib/modules" -name "$module.ko")" "$GUEST_DIR/"
    done
    # Last: it is what says that the rest is there.
    cp "$unpacked"/boot/vmlinuz-* "$GUEST_DIR/vmlinuz"
    rm -rf "$unpacked"
}

# Everything a run starts inherits SHEEP_TEST_RUN, its private directory, and is known by it: daemons too, whose parents
# are gone.
own_processes() {
    local process
    for process in /proc/[0-9]*; do
        if { tr '\0' '\n' <"$process/environ"; } 2>/dev/null | grep -qxF "SHEEP_TEST_RUN=$SHEEP_TEST_RUN"; then
            echo "${process#/proc/}"
        fi
    done
}

start_run() {
    SHEEP_TEST_RUN=$(mktemp -d "${TMPDIR:-/tmp}/sheep-run.XXXXXX")
    export SHEEP_TEST_RUN TMPDIR=$SHEEP_TEST_RUN
    trap 'end_run $?' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

# Ends what the run started, by process id, unmounts what it mounted, removes its directory. A run that passed and still
# left something behind has failed.
end_run() {
    local status=$1 left process mount_point namespace
    trap - EXIT
    # The substitution's own processes are gone by the time they would be looked at.
    left=$(for process in $(own_processes); do [[ $process == "$$" || ! -d /proc/$process ]] || echo "$process"; done)
    if [[ -n $left && $status == 0 ]]; then
        echo "left running:" >&2
        for process in $left; do { tr '\0' ' ' <"/proc/$process/cmdline"; echo; } >&2 2>/dev/null || true; done
        status=1
    fi
    for process in $left; do kill -KILL "$process" 2>/dev/null || true; done
    for mount_point in $(findmnt -rno TARGET | grep -F "$SHEEP_TEST_RUN/" || true); do
        [[ $status != 0 ]] || { echo "left mounted: $mount_point" >&2; status=1; }
        as_root umount -l "$mount_point" || true
    done
    # Networks of test programs that are no more: their names tell the process (tests/src/namespaces.rs).
    for namespace in /run/netns/sheeptest-*; do
        process=${namespace#/run/netns/sheeptest-}
        [[ -e $namespace && ! -d /proc/${process%%-*} ]] || continue
        [[ $status != 0 ]] || { echo "left behind: $namespace" >&2; status=1; }
        as_root ip netns delete "${namespace##*/}" || true
    done
    rm -rf "$SHEEP_TEST_RUN"
    exit "$status"
}

# Runs a command so that a signal to this script takes effect at once, not when the command ends.
run() {
    "$@" &
    wait "$!"
}
