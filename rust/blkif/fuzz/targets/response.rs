// SPDX-License-Identifier: GPL-2.0-only

//! A backend that writes anything: a frontend takes no more responses than it sent requests.

#![no_main]

use blkif::plan;
use blkif::ring::FrontRing;
use blkif::wire::op;
use blkif_fuzz::Input;
use blkif_fuzz::Page;
use libfuzzer_sys::fuzz_target;

const RSP_PROD: usize = 2;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let abi = input.abi();
    let page = Page::new(input);
    let mut front = FrontRing::new(&page, abi).unwrap();
    let (mut sent, mut taken) = (0, 0);
    while let Some(number) = page.next() {
        for id in 0..number % 33 {
            sent += u32::from(front.put(plan::flush(op::READ, 0, id.into())).is_ok());
        }
        let _ = front.publish();
        page.set(RSP_PROD, page.next().unwrap_or(0));
        while let Ok(Some(_)) = front.take_response() {
            taken += 1;
        }
        let _ = front.final_check(number);
        assert!(taken <= sent);
        assert_eq!(front.in_flight(), sent - taken);
        assert!(front.in_flight() <= front.capacity());
    }
});
