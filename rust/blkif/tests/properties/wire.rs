// SPDX-License-Identifier: GPL-2.0-only

//! What is written is read, in each layout, and what is read says all that counts.

use crate::common;
use blkif::id::RingId;
use blkif::wire::Abi;
use blkif::wire::RequestWords;
use blkif::wire::Response;
use blkif::wire::Status;
use blkif::wire::WireRequest;
use blkif::wire::WireSegment;
use proptest::prelude::*;

fn abi() -> impl Strategy<Value = Abi> {
    prop_oneof![Just(Abi::X86_64), Just(Abi::X86_32), Just(Abi::Arm)]
}

fn words() -> impl Strategy<Value = RequestWords> {
    (
        prop_oneof![0..8u8, any::<u8>()],
        proptest::collection::vec(any::<u32>(), 28),
    )
        .prop_map(|(operation, words)| {
            let mut words: RequestWords = words.try_into().unwrap();
            words[0] = (words[0] & !0xff) | u32::from(operation);
            words
        })
}

proptest! {
    #[test]
    fn requests_survive(request in common::request(), abi in abi()) {
        prop_assert_eq!(WireRequest::decode(abi, &request.encode(abi)), request);
    }

    #[test]
    fn the_words_of_a_slot_beyond_its_end_are_zero(request in common::request()) {
        prop_assert_eq!(request.encode(Abi::X86_32)[27], 0);
    }

    #[test]
    fn any_words_are_some_request(words in words(), abi in abi()) {
        let request = WireRequest::decode(abi, &words);
        let canonical = request.encode(abi);
        prop_assert_eq!(WireRequest::decode(abi, &canonical), request);
        prop_assert_eq!(canonical[0] as u8, words[0] as u8);
        // What the encoding has, it has from the words.
        for (canonical, word) in canonical.iter().zip(words) {
            prop_assert_eq!(canonical & !word, 0);
        }
    }

    #[test]
    fn layouts_differ_only_in_padding(request in common::request()) {
        let long = request.encode(Abi::X86_64);
        let short = request.encode(Abi::X86_32);
        prop_assert_eq!(long, request.encode(Abi::Arm));
        prop_assert_eq!(long[1], 0);
        prop_assert_eq!(long[0], short[0]);
        prop_assert_eq!(&long[2..], &short[1..27]);
    }

    #[test]
    fn segments_survive(segment in common::segment(), padding in any::<u16>()) {
        let [gref, range] = segment.encode();
        prop_assert_eq!(range >> 16, 0);
        let words = [gref, range | (u32::from(padding) << 16)];
        prop_assert_eq!(WireSegment::decode(words), segment);
    }

    #[test]
    fn responses_survive(words in any::<[u32; 3]>()) {
        let response = Response::decode(words);
        let encoded = response.encode();
        prop_assert_eq!(encoded[2] & 0xff00, 0);
        prop_assert_eq!(Response::decode(encoded), response);
        let status = (words[2] >> 16) as i16;
        prop_assert_eq!(response.status == Status::Okay, status == 0);
        prop_assert_eq!(response.status == Status::NotSupported, status == -2);
    }

    #[test]
    fn ids_survive(epoch: u32, queue in 0..4096u16, part in 0..4096u16, shadow: u16) {
        let id = RingId::new(epoch, queue, part, shadow).unwrap();
        prop_assert_eq!(id.epoch(), epoch & 0xff_ffff);
        prop_assert_eq!((id.queue(), id.part(), id.shadow()), (queue, part, shadow));
        prop_assert_eq!(RingId::from_wire(id.to_wire()), id);
    }
}
