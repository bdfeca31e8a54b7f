// SPDX-License-Identifier: GPL-2.0-only

//! Text of nodes: lines of `name=text`, as either side may find them.

#![no_main]

use blkif::negotiate::negotiate;
use blkif::negotiate::BackLimits;
use blkif::negotiate::BackOffer;
use blkif::negotiate::DiskNodes;
use blkif::negotiate::FrontChoice;
use blkif::negotiate::FrontLimits;
use blkif::node;
use blkif::node::InvalidNode;
use blkif::vdev::VirtualDevice;
use libfuzzer_sys::fuzz_target;

const FRONT: FrontLimits = FrontLimits {
    max_ring_page_order: 4,
    max_queues: 8,
    max_indirect_segments: 256,
    persistent: true,
    trusted: true,
};
const BACK: BackLimits = BackLimits {
    max_ring_page_order: 4,
    max_queues: 8,
    persistent: true,
};

fuzz_target!(|data: &[u8]| {
    let mut offer = BackOffer::default();
    let mut disk = DiskNodes::default();
    let mut choice = FrontChoice::default();
    for line in data.split(|byte| *byte == b'\n') {
        let Some(equals) = line.iter().position(|byte| *byte == b'=') else {
            continue;
        };
        let (name, text) = (&line[..equals], &line[equals + 1..]);
        if let Some(node) = find(&BackOffer::NODES, name) {
            check_message(offer.set(node, text));
        }
        if let Some(node) = find(&DiskNodes::NODES, name) {
            check_message(disk.set(node, text));
        }
        if let Some(node) = find(&FrontChoice::NODES, name) {
            check_message(choice.set(node, text));
        }
        match name {
            b"virtual-device" => {
                check_message(node::device_number("virtual-device", text).map(name_of))
            }
            b"physical-device" => check_message(node::physical_device("physical-device", text)),
            _ => {}
        }
    }
    agree(&offer, &disk, &choice);
});

fn find(nodes: &'static [&'static str], name: &[u8]) -> Option<&'static str> {
    nodes.iter().find(|node| node.as_bytes() == name).copied()
}

/// Checks that an error message is fit for the log.
fn check_message<T>(result: Result<T, InvalidNode>) {
    if let Err(bad) = result {
        let message = bad.to_string();
        assert!(message.len() < 200);
        assert!(message.chars().all(|c| c.is_ascii_graphic() || c == ' '));
    }
}

fn name_of(number: u32) {
    match VirtualDevice::new(number) {
        Ok(device) => {
            assert!(device.name.as_str().starts_with("xvd"));
            assert!(device.minor + device.minors <= 1 << 20);
        }
        Err(bad) => assert!(!bad.to_string().is_empty()),
    }
}

fn agree(offer: &BackOffer, disk: &DiskNodes, choice: &FrontChoice) {
    let features = negotiate(&FRONT, offer);
    assert!(features.rings.page_order <= 4 && (1..=8).contains(&features.rings.queues));
    assert!(features.indirect_segments <= 256);
    if let Ok(disk) = disk.disk() {
        assert!(disk.block_size.is_power_of_two());
        assert!(disk.physical_block_size >= disk.block_size);
        assert!(disk.sectors.checked_mul(512).is_some());
    }
    if let Ok(accepted) = choice.check(&BACK) {
        assert!(accepted.rings.page_order <= 4 && (1..=8).contains(&accepted.rings.queues));
    }
}
