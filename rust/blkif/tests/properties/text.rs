// SPDX-License-Identifier: GPL-2.0-only

//! Text of nodes, and names of disks.

use blkif::negotiate::negotiate;
use blkif::negotiate::BackOffer;
use blkif::negotiate::DiskNodes;
use blkif::negotiate::FrontChoice;
use blkif::negotiate::FrontLimits;
use blkif::node;
use blkif::vdev::NumberForm;
use blkif::vdev::VirtualDevice;
use proptest::prelude::*;

/// Returns text, which is often nearly a number.
fn text() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        "[0-9]{0,25}".prop_map(String::into_bytes),
        "[ +-]?[0-9a-fx:]{0,10}".prop_map(String::into_bytes),
        proptest::collection::vec(any::<u8>(), 0..40),
    ]
}

fn only_digits(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(u8::is_ascii_digit)
}

proptest! {
    #[test]
    fn numbers_are_read_as_they_are_written(number: u64, limit: u64) {
        let text = number.to_string();
        let read = node::decimal("n", text.as_bytes(), limit).ok();
        prop_assert_eq!(read, (number <= limit).then_some(number));
        let hex = format!("{:x}:{:x}", number >> 52, number & 0xf_ffff);
        let device = ((number >> 52) as u32, (number & 0xf_ffff) as u32);
        let read = node::physical_device("n", hex.as_bytes());
        prop_assert_eq!(read.map(|read| (read.major, read.minor)), Ok(device));
    }

    #[test]
    fn what_is_read_are_digits(text in text()) {
        let number = std::str::from_utf8(&text).ok().and_then(|text| text.parse::<u32>().ok());
        let expected = number.filter(|_| only_digits(&text));
        prop_assert_eq!(node::decimal_u32("n", &text).ok(), expected);
        prop_assert_eq!(node::boolean("n", &text).ok(), expected.map(|number| number != 0));
    }

    #[test]
    fn complaints_can_be_printed(text in text()) {
        for node in BackOffer::NODES {
            if let Err(bad) = BackOffer::default().set(node, &text) {
                let message = bad.to_string();
                prop_assert!(message.starts_with(node));
                prop_assert!(message.chars().all(|c| c.is_ascii_graphic() || c == ' '));
                prop_assert!(message.len() < 200);
            }
        }
        for node in DiskNodes::NODES {
            let set = DiskNodes::default().set(node, &text);
            prop_assert_eq!(set.is_ok(), valid_disk_node(node, &text));
        }
        for node in FrontChoice::NODES {
            let _ = FrontChoice::default().set(node, &text);
        }
    }

    #[test]
    fn no_more_is_agreed_on_than_both_offer(
        front: [u32; 3],
        back: [u32; 3],
        persistent: bool,
        trusted: bool,
    ) {
        let offer = FrontLimits {
            max_ring_page_order: front[0],
            max_queues: front[1],
            max_indirect_segments: front[2],
            persistent,
            trusted,
        };
        let other = BackOffer {
            max_ring_page_order: back[0],
            max_queues: back[1],
            max_indirect_segments: back[2],
            ..BackOffer::default()
        };
        let features = negotiate(&offer, &other);
        prop_assert!(features.rings.page_order <= front[0].min(back[0]).min(4));
        prop_assert!(features.rings.queues >= 1);
        prop_assert!(features.rings.queues <= front[1].min(back[1]).max(1));
        let segments = u32::from(features.indirect_segments);
        prop_assert!(segments <= front[2].min(back[2]).min(4096));
        prop_assert!(segments == 0 || segments > 11);
        prop_assert!(!features.persistent);
        prop_assert_eq!(features.bounce, !trusted);
    }

    #[test]
    fn an_extended_number_names_its_disk(disk in 0..4096u32, partition in 0..256u32) {
        let device = VirtualDevice::new((1 << 28) + disk * 256 + partition).unwrap();
        prop_assert_eq!((device.form, device.disk), (NumberForm::Extended, disk));
        let name = device.name.as_str().strip_prefix("xvd").unwrap();
        let letters = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let number = letters.bytes().fold(0, |sum, letter| sum * 26 + u32::from(letter - b'a') + 1);
        prop_assert_eq!(number - 1, disk);
        prop_assert_eq!(name[letters.len()..].parse().unwrap_or(0), partition);
    }

    #[test]
    fn minors_stay_below_their_limit(number: u32) {
        if let Ok(device) = VirtualDevice::new(number) {
            prop_assert!(device.minor + device.minors <= 1 << 20);
        }
    }
}

fn valid_disk_node(node: &str, text: &[u8]) -> bool {
    let number = std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse::<u64>().ok());
    let Some(number) = number.filter(|_| only_digits(text)) else {
        return false;
    };
    match node {
        "sectors" => number <= i64::MAX as u64 / 512,
        "info" | "removable" => number <= u32::MAX.into(),
        _ => [9, 10, 11, 12, 13, 14, 15, 16]
            .map(|shift| 1 << shift)
            .contains(&number),
    }
}
