// SPDX-License-Identifier: GPL-2.0-only

//! A slot that a frontend wrote: what is accepted stays on the disk and in its pages.

#![no_main]

use blkif::request::check;
use blkif::request::Data;
use blkif::request::Direct;
use blkif::request::DiskLimits;
use blkif::request::Extent;
use blkif::request::Request;
use blkif::wire::Status;
use blkif::wire::WireRequest;
use blkif_fuzz::Input;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let abi = input.abi();
    let disk = input.disk();
    let request = WireRequest::decode(abi, &[(); 28].map(|()| input.u32()));
    assert_eq!(WireRequest::decode(abi, &request.encode(abi)), request);
    match check(&request, &disk) {
        Ok(checked) => assert_valid(&checked, &disk),
        Err(refusal) => {
            assert_ne!(request.response(refusal.status()).status, Status::Okay);
            assert!(!refusal.to_string().is_empty());
        }
    }
});

fn assert_valid(request: &Request<'_>, disk: &DiskLimits) {
    match request {
        Request::Flush | Request::Barrier(None) => {}
        Request::Read(data) => assert_data(data, disk),
        Request::Write(data) => {
            assert!(!disk.read_only);
            assert_data(data, disk);
        }
        Request::Barrier(Some(direct)) => {
            assert!(!disk.read_only);
            assert_direct(direct, disk);
        }
        Request::Discard { extent, secure } => {
            assert!(!disk.read_only && disk.discard && (disk.secure_discard || !secure));
            assert_extent(*extent, disk);
        }
    }
}

fn assert_data(data: &Data<'_>, disk: &DiskLimits) {
    match data {
        Data::Direct(direct) => assert_direct(direct, disk),
        Data::Indirect(unfetched) => {
            assert!((1..=disk.indirect_segments.min(4096)).contains(&unfetched.count()));
            assert_eq!(
                unfetched.grefs().len(),
                usize::from(unfetched.count()).div_ceil(512)
            );
        }
    }
}

fn assert_direct(direct: &Direct<'_>, disk: &DiskLimits) {
    assert_extent(direct.extent(), disk);
    let mut bytes = 0;
    for segment in direct.segments() {
        assert!(segment.offset() + segment.len() <= 4096);
        bytes += u64::from(segment.len());
    }
    assert_eq!(bytes, direct.extent().sectors() * 512);
}

fn assert_extent(extent: Extent, disk: &DiskLimits) {
    assert!(extent.sectors() > 0);
    assert!(extent.sector() + extent.sectors() <= disk.sectors);
    assert_eq!(extent.sector() % u64::from(disk.block_size / 512), 0);
    assert_eq!(extent.sectors() % u64::from(disk.block_size / 512), 0);
}
