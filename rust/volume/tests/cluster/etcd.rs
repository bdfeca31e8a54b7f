// SPDX-License-Identifier: GPL-2.0-only

//! Transactions and leases of etcd.

use crate::proxy::{Fault, Proxy};
use daemons::Etcd;
use std::thread;
use std::time::{Duration, Instant};
use volume::etcd::{Etcd as Client, RETRY};
use volume::store::{Change, Commit, Condition, Store};
use volume::{Config, Errno};

fn put(key: &str, value: &str) -> Change {
    Change::Put(key.to_owned(), value.to_owned(), None)
}

fn is_done(commit: Commit) -> bool {
    matches!(commit, Commit::Done(_))
}

#[test]
fn conditions_and_leases() {
    let etcd = Etcd::start(1);
    let client = Client::new(etcd.urls());
    let absent = [Condition::Absent("/a/1".to_owned())];
    assert!(is_done(
        client.commit(&absent, &[put("/a/1", "ä")]).unwrap()
    ));
    assert_eq!(
        client.commit(&absent, &[put("/a/1", "2")]).unwrap(),
        Commit::Conflict
    );
    let entry = client.get("/a/1").unwrap().unwrap();
    assert_eq!(entry.value, "ä");
    let unchanged = Condition::Unchanged("/a/1".to_owned(), entry.revision);
    let conditions = [
        unchanged.clone(),
        Condition::Present("/a/1".to_owned()),
        Condition::NoneWith("/b/".to_owned()),
    ];
    assert!(is_done(
        client.commit(&conditions, &[put("/b/1", "1")]).unwrap()
    ));
    assert_eq!(
        client.commit(&conditions, &[put("/b/2", "1")]).unwrap(),
        Commit::Conflict
    );
    assert_eq!(client.list("/b/").unwrap().len(), 1);
    let delete = Change::Delete("/a/1".to_owned());
    assert!(is_done(client.commit(&[unchanged], &[delete]).unwrap()));
    assert_eq!(client.get("/a/1").unwrap(), None);
    let lease = client.grant(Duration::from_secs(2)).unwrap();
    let change = Change::Put("/c".to_owned(), String::new(), Some(lease));
    assert!(is_done(client.commit(&[], &[change]).unwrap()));
    assert!(client.keep_alive(lease).unwrap());
    daemons::wait_until("the lease ends", || client.get("/c").unwrap().is_none());
    assert!(!client.keep_alive(lease).unwrap());
    let lease = client.grant(Duration::from_secs(60)).unwrap();
    client.revoke(lease).unwrap();
    client.revoke(lease).unwrap();
    assert!(!client.keep_alive(lease).unwrap());
}

#[test]
fn members_that_are_killed_cost_time_and_no_transaction_is_lost_or_applied_twice() {
    let mut etcd = Etcd::start(3);
    let urls = etcd.urls();
    let writer = thread::spawn(move || {
        let client = Client::new(urls);
        let end = Instant::now() + Duration::from_secs(15);
        let mut longest = Duration::ZERO;
        let mut number = 0;
        while Instant::now() < end {
            // Applied twice it would be a conflict.
            let key = format!("/n/{number}");
            let start = Instant::now();
            let absent = [Condition::Absent(key.clone())];
            assert!(is_done(client.commit(&absent, &[put(&key, "")]).unwrap()));
            longest = longest.max(start.elapsed());
            number += 1;
        }
        (number, longest)
    });
    for member in 0..3 {
        thread::sleep(Duration::from_secs(2));
        etcd.members[member].kill();
        thread::sleep(Duration::from_secs(2));
        etcd.members[member].restart();
        etcd.wait();
    }
    let (number, longest) = writer.join().unwrap();
    eprintln!(
        "etcd, members killed in turn: longest stall: {} ms",
        longest.as_millis()
    );
    assert!(number > 20, "{number}");
    etcd.wait();
    let client = Client::new(etcd.urls());
    assert_eq!(client.list("/n/").unwrap().len(), number);
}

#[test]
fn a_transaction_whose_answer_was_lost_is_applied_once() {
    let etcd = Etcd::start(1);
    let proxy = Proxy::start(&etcd.urls()[0], Fault::LosesAnswer);
    let client = Client::new(vec![proxy.url()]);
    let absent = [Condition::Absent("/a".to_owned())];
    let commit = client.commit(&absent, &[put("/a", "1")]).unwrap();
    let entry = client.get("/a").unwrap().unwrap();
    assert_eq!(commit, Commit::Done(entry.revision));
    assert!(proxy.has_failed());
}

#[test]
fn after_a_conflict_a_late_attempt_is_not_applied() {
    let etcd = Etcd::start(1);
    let client = Client::new(etcd.urls());
    assert!(is_done(client.commit(&[], &[put("/a", "1")]).unwrap()));
    let proxy = Proxy::start(&etcd.urls()[0], Fault::Delays);
    let slow = Client::new(vec![proxy.url()]);
    let absent = [Condition::Absent("/a".to_owned())];
    let commit = slow.commit(&absent, &[put("/a", "2")]).unwrap();
    assert_eq!(commit, Commit::Conflict);
    let delete = Change::Delete("/a".to_owned());
    assert!(is_done(client.commit(&[], &[delete]).unwrap()));
    assert!(proxy.deliver().contains("\"response_range\""));
    assert_eq!(client.get("/a").unwrap(), None);
}

#[test]
fn without_a_majority_creation_fails_with_the_reason() {
    let mut etcd = Etcd::start(3);
    let config = Config {
        etcd: etcd.urls(),
        host: "a".to_owned(),
    };
    let registry = volume::connect(&config);
    let dir = daemons::work_dir("images");
    registry
        .add_storage("s", &format!("dir:{}", dir.display()))
        .unwrap();
    etcd.members[0].kill();
    etcd.members[1].kill();
    let start = Instant::now();
    let error = registry
        .create(&"s/a".parse().unwrap(), 1 << 20)
        .unwrap_err();
    assert_eq!(error.errno(), Errno::TIMEDOUT);
    assert!(error.remedy().contains("majority"), "{error}");
    assert!(start.elapsed() >= Duration::from_secs(5));
    assert!(start.elapsed() < RETRY * 4, "{:?}", start.elapsed());
    etcd.members[0].restart();
    etcd.wait();
    registry.create(&"s/a".parse().unwrap(), 1 << 20).unwrap();
    assert_eq!(registry.list(None).unwrap().len(), 1);
}
