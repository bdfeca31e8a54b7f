# SPDX-License-Identifier: GPL-2.0-only
# What the shell scripts share. Sourced, never run.
#
# cache       where downloads, build roots and kernels are kept, outside the tree
# build root  a Debian trixie directory tree with every tool the project needs
# shellcheck shell=bash disable=SC2034

TREE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CACHE=${RBLKIF_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/rblkif}

# say MESSAGE: progress, on stderr so that stdout stays an answer.
say() {
	printf '  %s\n' "$*" >&2
}

# die MESSAGE...: one line each, then the end.
die() {
	printf '%s: %s\n' "${0##*/}" "$1" >&2
	shift
	[ $# -eq 0 ] || printf '    %s\n' "$@" >&2
	exit 1
}

# as_root CMD...: runs CMD as root, through sudo where needed.
as_root() {
	if [ "$(id -u)" -eq 0 ]; then
		"$@"
	elif command -v sudo >/dev/null; then
		sudo -- "$@"
	else
		die "root is needed for: $*" "Run as root, or install sudo."
	fi
}

# keep_root: asks for the password, if one is needed, before anything else runs, and keeps
# what sudo remembers of it while this script runs: it forgets within minutes. Who calls
# this ends $root_keeper.
keep_root() {
	root_keeper=
	[ "$(id -u)" -ne 0 ] || return 0
	as_root true
	while sleep 30 && kill -0 $$ && sudo -n -v; do :; done 2>/dev/null &
	root_keeper=$!
}

# watch PID: says every ten seconds that it still runs, until it does not.
watch() {
	local start=$SECONDS
	while kill -0 "$1" 2>/dev/null; do
		sleep 1
		[ $(((SECONDS - start) % 10)) -ne 9 ] || say "... $((SECONDS - start + 1)) s"
	done
}

# end_with_children PID...: ends processes and all that they have started, as root or not.
end_with_children() {
	local pid children
	for pid; do
		children=$(cat "/proc/$pid/task/$pid/children" 2>/dev/null) || continue
		kill "$pid" 2>/dev/null || sudo -n kill "$pid" 2>/dev/null
		# shellcheck disable=SC2086 # a list
		end_with_children $children
	done
}

# logged LOG TITLE CMD...: runs CMD with its output in LOG, and says every ten
# seconds that it still runs. On failure: the last lines and where the log is.
logged() {
	local log=$1 title=$2 start=$SECONDS pid status=0
	shift 2
	mkdir -p "${log%/*}"
	say "$title (log: $log)"
	"$@" >"$log" 2>&1 &
	pid=$!
	watch "$pid"
	wait "$pid" || status=$?
	if [ "$status" -ne 0 ]; then
		tail -n 15 "$log" >&2
		die "failed after $((SECONDS - start)) s: $title" "The whole log: $log"
	fi
	say "done in $((SECONDS - start)) s"
}
