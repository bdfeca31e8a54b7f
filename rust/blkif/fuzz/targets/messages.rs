// SPDX-License-Identifier: GPL-2.0-only

//! What comes over the sockets of `rblkd` and `rblktap`, and the names that a user types.

#![no_main]

use api::AgentCall;
use api::DiskCommand;
use api::DiskId;
use api::DiskStatus;
use api::Failure;
use api::FailureKind;
use api::Record;
use engine::Uri;
use libfuzzer_sys::fuzz_target;
use std::io::Read;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

fuzz_target!(|data: &[u8]| {
    let (mut client, server) = UnixStream::pair().unwrap();
    client.write_all(data).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let refused = || Failure::new(FailureKind::Refused, "cause", "remedy");
    // A line that is too long, or not UTF-8, ends the connection.
    let _ = api::socket::serve(server, |_: AgentCall| Err::<u32, _>(refused()));
    let mut replies = String::new();
    client.read_to_string(&mut replies).unwrap();
    let lines = data.iter().filter(|byte| **byte == b'\n').count();
    assert!(replies.lines().count() <= lines + 1);

    let _ = serde_json::from_slice::<DiskCommand>(data);
    let _ = serde_json::from_slice::<DiskStatus>(data);
    let _ = serde_json::from_slice::<Record>(data);
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(disk) = text.parse::<DiskId>() {
        assert_eq!(disk.to_string(), text);
    }
    if let Ok(uri) = text.parse::<Uri>() {
        assert_eq!(uri.to_string().parse::<Uri>().unwrap(), uri);
    }
});
