// SPDX-License-Identifier: GPL-2.0-only

//! The registry with real daemons.

mod attach;
mod clock;
mod create;
mod etcd;
mod host;
mod io;
mod proxy;

use daemons::Ceph;
use std::sync::OnceLock;

/// Returns the Ceph cluster of all tests, which ends with the namespace of this process.
fn ceph() -> &'static Ceph {
    static CEPH: OnceLock<Ceph> = OnceLock::new();
    CEPH.get_or_init(|| Ceph::start(1))
}

/// Returns the URI of a storage on that cluster.
fn ceph_storage(namespace: &str) -> String {
    let ceph = ceph();
    ceph.rbd(&["namespace", "create", &format!("rbd/{namespace}")]);
    format!("rbd:rbd/{namespace}?conf={}", ceph.conf())
}
