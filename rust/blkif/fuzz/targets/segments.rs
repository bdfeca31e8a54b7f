// SPDX-License-Identifier: GPL-2.0-only

//! Pages of segments that a frontend wrote: the extent is as long as the accepted segments
//! together.

#![no_main]

use blkif::request::check;
use blkif::request::Data;
use blkif::request::Request;
use blkif::wire::op;
use blkif::wire::IndirectRequest;
use blkif::wire::WireRequest;
use blkif_fuzz::Input;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let disk = input.disk();
    let request = WireRequest::Indirect(IndirectRequest {
        operation: op::READ,
        nr_segments: input.u16(),
        handle: 0,
        id: 1,
        sector: input.u64(),
        grefs: [1; 8],
    });
    let Ok(Request::Read(Data::Indirect(unfetched))) = check(&request, &disk) else {
        return;
    };
    let mut checker = unfetched.checker(&disk);
    let (mut count, mut bytes) = (0, 0);
    while !input.is_empty() {
        let Ok(segment) = checker.push(input.segment()) else {
            return;
        };
        assert!(segment.offset() + segment.len() <= 4096);
        bytes += u64::from(segment.len());
        count += 1;
    }
    let Ok(extent) = checker.finish() else { return };
    assert_eq!(count, unfetched.count());
    assert_eq!(extent.sectors() * 512, bytes);
    assert!(extent.sector() + extent.sectors() <= disk.sectors);
});
