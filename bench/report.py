# SPDX-License-Identifier: GPL-2.0
"""The table of a run, and what has changed since another one."""


def total(result):
    """Instructions of an I/O, over all domains and Xen, without idling."""
    return sum(count for name, count in result["instructions"].items() if name != "idle")


def print_report(document, base=None):
    """Prints a table for each kind of guest and setting."""
    results = document["results"]
    for kind, setting in sorted({(r["type"], r["setting"]) for r in results}):
        chosen = [r for r in results if (r["type"], r["setting"]) == (kind, setting)]
        print(f"\n{kind}, {setting} settings, kernel {document['kernel']}: instructions for each I/O")
        _print_table(chosen, base)


def _print_table(results, base):
    floors = {
        (r["where"], r["cell"]): total(r) for r in results if r["where"] in ("guest", "dom0")
    }
    control = {r["cell"]: total(r) for r in results if r["where"] == "pair" and r["pair"] == "C/C"}
    before = {_key(r): total(r) for r in (base or {"results": []})["results"]}
    print(
        f"{'cell':20}{'pair':5}{'total':>10}{'of C/C':>8}{'guest':>9}{'xen':>8}{'dom0':>9}"
        f"{'hcalls':>8}{'grant':>7}{'empty':>6}{'notif':>7}{'switch':>7}{'copied':>9}{'clock':>10}"
        f"{'floor guest':>12}{'dom0':>8}" + (f"{'of base':>9}" if base else "")
    )
    for r in sorted(results, key=lambda r: _order(results, r)):
        if r["where"] != "pair":
            continue
        here = total(r)
        row = r["instructions"]
        events = r["events"]
        ratio = here / control[r["cell"]] if r["cell"] in control else 0
        line = (
            f"{r['cell']:20}{r['pair']:5}{here:10.0f}{ratio:8.3f}{row.get('guest', 0):9.0f}"
            f"{row.get('xen', 0):8.0f}{row.get('dom0', 0):9.0f}"
            f"{sum(r['hypercalls'].values()):8.2f}"
            f"{_sum(r['grants'], ' calls') - r['grants'].get('empty calls', 0):7.2f}{r['grants'].get('empty calls', 0):6.2f}"
            f"{_sum(events, ':notifications'):7.2f}{_sum(events, ':switches'):7.2f}"
            f"{_sum(events, 'copied bytes'):9.0f}{r['clock']:10.0f}"
            f"{floors.get(('guest', r['cell']), 0):12.0f}{floors.get(('dom0', r['cell']), 0):8.0f}"
        )
        if base:
            line += f"{here / before[_key(r)]:9.3f}" if _key(r) in before else "        -"
        print(line)


def _order(results, result):
    cells = list(dict.fromkeys(r["cell"] for r in results))
    return cells.index(result["cell"]), result["pair"]


def _key(result):
    return tuple(result[name] for name in ("type", "setting", "where", "cell", "pair"))


def _sum(counts, end):
    return sum(count for name, count in counts.items() if name.endswith(end))
