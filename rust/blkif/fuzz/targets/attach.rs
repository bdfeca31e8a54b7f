// SPDX-License-Identifier: GPL-2.0-only

//! A frontend that writes anything: a backend attaches to possible indices only, and has no more
//! requests in flight than there are slots.

#![no_main]

use blkif::ring::BackRing;
use blkif::wire::Status;
use blkif_fuzz::Input;
use blkif_fuzz::Page;
use libfuzzer_sys::fuzz_target;

const REQ_PROD: usize = 0;
const RSP_PROD: usize = 2;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let abi = input.abi();
    let page = Page::new(input);
    let at = page.next().unwrap_or(0);
    page.set(RSP_PROD, at);
    page.set(REQ_PROD, at.wrapping_add(page.next().unwrap_or(0)));
    let Ok(mut back) = BackRing::attach(&page, abi) else {
        return;
    };
    let mut waiting = Vec::new();
    while let Some(number) = page.next() {
        while let Ok(Some(request)) = back.take_request() {
            waiting.push(request.response(Status::Error));
        }
        assert_eq!(back.in_flight() as usize, waiting.len());
        assert!(back.in_flight() <= back.capacity());
        for response in waiting.drain(..waiting.len().min(number as usize % 64)) {
            back.put(&response).unwrap();
        }
        let _ = back.publish();
        let _ = back.final_check();
        page.set(REQ_PROD, at.wrapping_add(page.next().unwrap_or(0)));
    }
});
