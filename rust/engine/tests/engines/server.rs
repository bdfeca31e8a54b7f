// SPDX-License-Identifier: GPL-2.0-only

//! Servers that tests start, and that end with them.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Returns `true` if a program is installed.
pub fn is_installed(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok()
}

/// A server that is killed when it is dropped.
pub struct Server(Child);

impl Server {
    /// Starts a server and waits until it accepts connections.
    pub fn start(program: &str, args: &[&str], socket: &Path) -> Self {
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut server = Self(child);
        let deadline = Instant::now() + Duration::from_secs(60);
        while UnixStream::connect(socket).is_err() {
            let status = server.0.try_wait().unwrap();
            assert!(status.is_none(), "{program} {args:?}: {status:?}");
            assert!(Instant::now() < deadline, "{program} does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
