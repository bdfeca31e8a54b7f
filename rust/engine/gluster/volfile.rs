// SPDX-License-Identifier: GPL-2.0-only

//! The description of a volume that a client gets, which GlusterFS calls a volfile.
//!
//! ```text
//! volume fast-replicate-0
//!     type cluster/replicate
//!     option quorum-type auto
//!     subvolumes fast-client-0 fast-client-1 fast-client-2
//! end-volume
//! ```

/// The parts of one translator that matter here.
#[derive(Default)]
struct Translator<'a> {
    kind: &'a str,
    quorum: Option<&'a str>,
    has_arbiter: bool,
    children: usize,
}

/// Returns why a volume may lose writes that it has acknowledged, or `None` if it does not.
pub(super) fn loses_writes(volfile: &str) -> Option<&'static str> {
    translators(volfile).iter().find_map(|translator| {
        match (translator.kind, translator.children) {
            ("performance/write-behind", _) => {
                Some("it acknowledges writes before they are on the bricks (write-behind)")
            }
            ("cluster/replicate", ..=2) => Some("it has two replicas and no arbiter"),
            ("cluster/replicate", _) if translator.quorum == Some("none") => {
                Some("it accepts writes without a quorum of bricks")
            }
            ("cluster/replicate", _)
                if translator.quorum == Some("fixed") && !translator.has_arbiter =>
            {
                Some("its quorum is a fixed number of bricks")
            }
            _ => None,
        }
    })
}

fn translators(volfile: &str) -> Vec<Translator<'_>> {
    let mut all = Vec::new();
    let mut current = Translator::default();
    for line in volfile.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["type", kind] => current.kind = kind,
            ["option", "quorum-type", value] => current.quorum = Some(value),
            ["option", "arbiter-count", value] => current.has_arbiter = value != "0",
            ["subvolumes", ref children @ ..] => current.children = children.len(),
            ["end-volume"] => all.push(std::mem::take(&mut current)),
            _ => {}
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(kind: &str, options: &str, children: &str) -> String {
        format!("volume v\n    type {kind}\n{options}    subvolumes {children}\nend-volume\n")
    }

    #[test]
    fn volumes_that_keep_writes_are_accepted() {
        for volfile in [
            volume(
                "cluster/replicate",
                "    option quorum-type auto\n",
                "a b c",
            ),
            volume("cluster/replicate", "    option arbiter-count 1\n", "a b c"),
            volume("cluster/replicate", "", "a b c"),
            volume("cluster/disperse", "", "a b c"),
            String::new(),
        ] {
            assert_eq!(loses_writes(&volfile), None, "{volfile}");
        }
    }

    #[test]
    fn volumes_that_lose_writes_are_refused() {
        let good = volume(
            "cluster/replicate",
            "    option quorum-type auto\n",
            "a b c",
        );
        for volfile in [
            volume(
                "cluster/replicate",
                "    option quorum-type none\n",
                "a b c",
            ),
            volume(
                "cluster/replicate",
                "    option quorum-type fixed\n",
                "a b c",
            ),
            volume("cluster/replicate", "    option quorum-type auto\n", "a b"),
            good + &volume("performance/write-behind", "", "a"),
        ] {
            assert!(loses_writes(&volfile).is_some(), "{volfile}");
        }
    }
}
