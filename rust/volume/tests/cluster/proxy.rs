// SPDX-License-Identifier: GPL-2.0-only

//! A proxy before etcd, in which the first transaction meets a fault.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// The fate of the first transaction. The client gets no answer.
#[derive(Clone, Copy)]
pub enum Fault {
    /// It is applied, and its answer is lost.
    LosesAnswer,
    /// It is held back until [`Proxy::deliver`].
    Delays,
}

struct State {
    /// Set until the fault has happened.
    fault: Option<Fault>,
    delayed: Vec<u8>,
}

pub struct Proxy {
    port: u16,
    server: String,
    state: Arc<Mutex<State>>,
}

impl Proxy {
    /// Starts a proxy for a member of etcd.
    pub fn start(url: &str, fault: Fault) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = url.trim_start_matches("http://").to_owned();
        let state = State {
            fault: Some(fault),
            delayed: Vec::new(),
        };
        let state = Arc::new(Mutex::new(state));
        let proxy = Self {
            port,
            server: server.clone(),
            state: state.clone(),
        };
        thread::spawn(move || {
            for stream in listener.incoming() {
                serve(&server, &state, stream.unwrap());
            }
        });
        proxy
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn has_failed(&self) -> bool {
        self.state.lock().unwrap().fault.is_none()
    }

    /// Sends the transaction that was held back, and returns the answer.
    pub fn deliver(&self) -> String {
        let answer = forward(&self.server, &self.state.lock().unwrap().delayed);
        String::from_utf8(answer).unwrap()
    }
}

/// Handles one connection, which has one call.
fn serve(server: &str, state: &Mutex<State>, mut stream: TcpStream) {
    let request = read_request(&stream);
    let mut state = state.lock().unwrap();
    let is_transaction = request.starts_with(b"POST /v3/kv/txn");
    match is_transaction.then(|| state.fault.take()).flatten() {
        Some(Fault::Delays) => state.delayed = request,
        Some(Fault::LosesAnswer) => {
            forward(server, &request);
        }
        None => stream.write_all(&forward(server, &request)).unwrap(),
    }
}

/// Reads a call, and has etcd close the connection after it.
fn read_request(stream: &TcpStream) -> Vec<u8> {
    let mut reader = BufReader::new(stream);
    let (mut request, mut length) = (String::new(), 0);
    reader.read_line(&mut request).unwrap();
    request.push_str("Connection: close\r\n");
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let lower = line.to_ascii_lowercase();
        if let Some(number) = lower.strip_prefix("content-length:") {
            length = number.trim().parse().unwrap();
        }
        request.push_str(&line);
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    [request.into_bytes(), body].concat()
}

/// Sends a call to etcd and returns the answer.
fn forward(server: &str, request: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(server).unwrap();
    stream.write_all(request).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    answer
}
