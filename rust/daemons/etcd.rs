// SPDX-License-Identifier: GPL-2.0-only

//! An etcd cluster of one or three members.

use crate::daemon::{wait_until, Daemon, LIMIT};
use crate::work_dir;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU16, Ordering};

/// The next port that no member of this process uses.
static PORT: AtomicU16 = AtomicU16::new(22379);

/// An etcd cluster.
pub struct Etcd {
    /// The members.
    pub members: Vec<Daemon>,
    ports: Vec<u16>,
}

impl Etcd {
    /// Starts a cluster and waits until each member can commit.
    pub fn start(members: u16) -> Self {
        let ports: Vec<u16> = (0..members)
            .map(|_| PORT.fetch_add(2, Ordering::Relaxed))
            .collect();
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let cluster: Vec<String> = ports
            .iter()
            .map(|port| format!("m{port}={}", url(port + 1)))
            .collect();
        let cluster = cluster.join(",");
        let members = ports.iter().map(|port| {
            let dir = work_dir(&format!("etcd-{port}"));
            let data = dir.join("data");
            let (client, peer) = (url(*port), url(port + 1));
            let args = [
                "--name",
                &format!("m{port}"),
                "--data-dir",
                data.to_str().unwrap(),
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
                "--initial-cluster",
                &cluster,
                "--unsafe-no-fsync",
                "--log-level",
                "error",
            ];
            Daemon::start("etcd", args, &dir.join("log"))
        });
        let mut etcd = Self {
            members: members.collect(),
            ports,
        };
        etcd.wait();
        etcd
    }

    /// Waits until each member that runs can commit.
    pub fn wait(&mut self) {
        for (member, port) in self.members.iter_mut().zip(&self.ports) {
            if !member.is_started() {
                continue;
            }
            wait_until("etcd can commit", || {
                member.check();
                is_healthy(*port).unwrap_or(false)
            });
        }
    }

    /// Returns the URLs for clients.
    pub fn urls(&self) -> Vec<String> {
        let url = |port| format!("http://127.0.0.1:{port}");
        self.ports.iter().map(url).collect()
    }
}

/// Returns `true` if a member has a leader and reads through it.
fn is_healthy(port: u16) -> io::Result<bool> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.contains(r#""health":"true""#))
}
