// SPDX-License-Identifier: GPL-2.0-only

//! A toolstack and a frontend, over the fake of Xen.

#![allow(dead_code)]

use api::Quota;
use blkif::negotiate::BackOffer;
use blkif::ring::FrontRing;
use blkif::ring::SharedMemory;
use blkif::wire::op;
use blkif::wire::Abi;
use blkif::wire::IndirectRequest;
use blkif::wire::Response;
use blkif::wire::RwRequest;
use blkif::wire::Status;
use blkif::wire::WireRequest;
use blkif::wire::WireSegment;
use blkif::wire::DIRECT_SEGMENTS;
use blkif::wire::INDIRECT_PAGES;
use engine::Access;
use engine::Engine;
use rblktap::device;
use rblktap::device::Config;
use rblktap::device::Device;
use rblktap::device::Settings;
use rblktap::device::ToolstackNodes;
use rblktap::device::Xen;
use rblktap::Disk;
use rblktap::Error;
use serde_json::Value;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::fence;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::Arc;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;
use xen_user::event::Channel;
use xen_user::fake::FakeChannel;
use xen_user::fake::Host;
use xen_user::memory::Pages;
use xen_user::proxy::Proxy;
use xen_user::xenstore::Nodes;
use xen_user::xenstore::Xenstore;

pub const DOMAIN: u16 = 5;
pub const DEVICE: u32 = 51712;
pub const BACK: &str = "backend/vbd3/5/51712";
pub const FRONT: &str = "/local/domain/5/device/vbd/51712";
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for something, with a deadline.
pub fn wait_for(what: &str, mut check: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !check() {
        assert!(Instant::now() < end, "not in time: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The toolstack: what `xl block-attach` and `xl block-detach` write.
pub struct Toolstack {
    pub host: Host,
    pub store: Xenstore,
}

impl Toolstack {
    pub fn new(mode: &str) -> Self {
        let host = Host::new();
        let mut store = host.xenstore().unwrap();
        for (node, value) in [
            ("frontend", FRONT),
            ("frontend-id", "5"),
            ("mode", mode),
            ("online", "1"),
            ("removable", "0"),
            ("state", "1"),
        ] {
            store.write(&format!("{BACK}/{node}"), value).unwrap();
        }
        store.write(&format!("{FRONT}/state"), "1").unwrap();
        Self { host, store }
    }

    pub fn state(&mut self) -> String {
        let state = self.store.read_text(&format!("{BACK}/state"));
        state.unwrap().unwrap_or_default()
    }

    pub fn wait_state(&mut self, state: &str) {
        wait_for(&format!("state {state}"), || self.state() == state);
    }

    pub fn node(&mut self, name: &str) -> Option<String> {
        self.store.read_text(&format!("{BACK}/{name}")).unwrap()
    }

    pub fn start_detach(&mut self) {
        self.store.write(&format!("{BACK}/online"), "0").unwrap();
        self.store.write(&format!("{BACK}/state"), "5").unwrap();
    }
}

/// The configuration of a served disk.
pub struct Options<'a> {
    pub state_dir: &'a Path,
    pub persistent: bool,
    pub block_size: u32,
    pub max_queues: u32,
    pub retry_time: Duration,
    pub wait_for_space: bool,
    pub stuck_time: Duration,
    pub quota: Quota,
    pub drain_time: Duration,
}

impl<'a> Options<'a> {
    pub fn new(state_dir: &'a Path) -> Self {
        Self {
            state_dir,
            persistent: false,
            block_size: 512,
            max_queues: 4,
            retry_time: Duration::from_secs(10),
            wait_for_space: false,
            stuck_time: Duration::from_secs(10),
            quota: Quota {
                pages: 4096,
                requests: 1024,
            },
            drain_time: Duration::from_secs(3600),
        }
    }
}

/// Serves the disk in a thread, with what a confined process may use of xenstore.
pub fn serve(
    toolstack: &mut Toolstack,
    engine: Box<dyn Engine>,
    options: &Options<'_>,
) -> JoinHandle<Result<(), Error>> {
    let store = toolstack.host.xenstore().unwrap();
    let (proxy, client) = Proxy::new(store, device::permissions(BACK, FRONT)).unwrap();
    thread::spawn(move || proxy.run());
    let store = Xenstore::from_fd(client);
    serve_with(toolstack, store, engine, options)
}

/// Serves the disk in a thread, over a connection to xenstore.
pub fn serve_with(
    toolstack: &mut Toolstack,
    store: Xenstore,
    engine: Box<dyn Engine>,
    options: &Options<'_>,
) -> JoinHandle<Result<(), Error>> {
    serve_after(toolstack, store, engine, options, || {})
}

/// Serves the disk in a thread that does something else first.
pub fn serve_after(
    toolstack: &mut Toolstack,
    store: Xenstore,
    engine: Box<dyn Engine>,
    options: &Options<'_>,
    first: impl FnOnce() + Send + 'static,
) -> JoinHandle<Result<(), Error>> {
    let nodes = ToolstackNodes::read(&mut toolstack.store, BACK, DOMAIN).unwrap();
    let host = &toolstack.host;
    let config = Config {
        domain: DOMAIN,
        device: DEVICE,
        pid: std::process::id(),
        dir: BACK.to_string(),
        state_dir: options.state_dir.to_owned(),
        stats_root: None,
        max_queues: options.max_queues,
        persistent: options.persistent,
        is_exported: true,
        settings: Settings {
            retry_time: options.retry_time,
            wait_for_space: options.wait_for_space,
            stuck_time: options.stuck_time,
        },
        quota: options.quota,
        drain_time: options.drain_time,
    };
    let xen = Xen {
        grants: Arc::new(host.clone()),
        events: Box::new(host.clone()),
    };
    let disk = Disk::new(
        engine.info(),
        options.block_size,
        nodes.discard,
        nodes.removable,
    );
    let device = Device::new(config.clone(), nodes, store, xen, engine, disk).unwrap();
    thread::spawn(move || {
        first();
        device.run().inspect(|()| config.remove_files())
    })
}

/// Asks the process over its control socket.
pub fn control(state_dir: &Path, command: &str) -> Value {
    control_with(state_dir, &format!(r#"{{"command":"{command}"}}"#))
}

/// Sends a command with its parameters.
pub fn control_with(state_dir: &Path, command: &str) -> Value {
    let path = state_dir.join(format!("{DOMAIN}-{DEVICE}.sock"));
    let mut stream = UnixStream::connect(path).unwrap();
    writeln!(stream, "{command}").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}

/// Connects to the NBD socket, as the device model of an HVM guest does.
pub fn emulated(state_dir: &Path) -> Box<dyn Engine> {
    let socket = state_dir.join(format!("{DOMAIN}-{DEVICE}.nbd"));
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    engine::open(&uri.parse().unwrap(), &engine::Options::default()).unwrap()
}

/// Writes a text to the second sector over NBD, and flushes it.
pub fn write_emulated(emulated: &dyn Engine, text: &[u8]) {
    let mut queue = emulated.queue(1).unwrap();
    let mut data = emulated.allocate(512).unwrap();
    data.write_at(0, text).unwrap();
    queue.submit(engine::Request::write(0, 512, vec![data]));
    queue.submit(engine::Request::flush(1));
    let mut done = Vec::new();
    queue.drain(Duration::from_secs(100), &mut done).unwrap();
    assert!(done.iter().all(|completion| completion.result.is_ok()));
}

pub struct Shared(Arc<Pages>);

impl SharedMemory for Shared {
    fn words(&self) -> usize {
        self.0.len() / 4
    }

    fn load(&self, word: usize) -> u32 {
        self.0.load(word)
    }

    fn store(&self, word: usize, value: u32) {
        self.0.store(word, value);
    }

    fn rmb(&self) {
        fence(SeqCst);
    }

    fn wmb(&self) {
        fence(SeqCst);
    }

    fn mb(&self) {
        fence(SeqCst);
    }
}

/// One ring of a frontend.
pub struct Ring {
    pub ring: FrontRing<Shared>,
    /// The memory of the ring.
    pub memory: Arc<Pages>,
    pub channel: FakeChannel,
}

impl Ring {
    pub fn put(&mut self, request: WireRequest) {
        self.ring.put(request).unwrap();
    }

    pub fn publish(&mut self) {
        if self.ring.publish() {
            self.channel.notify().unwrap();
        }
    }

    pub fn try_response(&mut self) -> Option<Response> {
        if let Some(response) = self.ring.take_response().unwrap() {
            return Some(response);
        }
        if self.ring.final_check(1) {
            return self.ring.take_response().unwrap();
        }
        None
    }

    pub fn response(&mut self) -> Response {
        let mut response = None;
        wait_for("a response", || {
            response = self.try_response();
            response.is_some()
        });
        response.unwrap()
    }

    pub fn call(&mut self, request: WireRequest) -> Response {
        self.put(request);
        self.publish();
        let response = self.response();
        assert_eq!(response.id, request.id());
        response
    }
}

/// A frontend.
pub struct Front {
    pub host: Host,
    pub store: Xenstore,
    pub abi: Abi,
    pub rings: Vec<Ring>,
    /// Pages for data.
    pub data: Pages,
    pub references: Vec<u32>,
    /// Pages for segments of indirect requests.
    pub lists: Pages,
    pub list_references: Vec<u32>,
}

/// What a frontend chooses.
#[derive(Clone, Copy)]
pub struct Choice {
    pub abi: Abi,
    pub order: u32,
    pub queues: u32,
    pub persistent: bool,
}

impl Choice {
    pub const PLAIN: Self = Self {
        abi: Abi::X86_64,
        order: 0,
        queues: 1,
        persistent: false,
    };
}

impl Front {
    /// Connects, and waits until the disk is described.
    pub fn connect(toolstack: &mut Toolstack, choice: Choice) -> Self {
        toolstack.wait_state("2");
        let mut front = Self::offer(&toolstack.host, choice);
        front.set_state("3");
        toolstack.wait_state("4");
        front.set_state("4");
        front
    }

    /// Writes what it has chosen.
    pub fn offer(host: &Host, choice: Choice) -> Self {
        let mut store = host.xenstore().unwrap();
        let mut write = |node: &str, value: &str| {
            store.write(&format!("{FRONT}/{node}"), value).unwrap();
        };
        write("protocol", choice.abi.name());
        write(
            "feature-persistent",
            &u32::from(choice.persistent).to_string(),
        );
        if choice.queues > 1 {
            write("multi-queue-num-queues", &choice.queues.to_string());
        }
        if choice.order > 0 {
            write("ring-page-order", &choice.order.to_string());
        }
        let mut rings = Vec::new();
        for index in 0..choice.queues {
            let dir = if choice.queues > 1 {
                format!("queue-{index}/")
            } else {
                String::new()
            };
            let (pages, references) = host
                .grant(DOMAIN, 1 << choice.order, Access::ReadWrite)
                .unwrap();
            for (page, reference) in references.iter().enumerate() {
                let number = if choice.order > 0 {
                    page.to_string()
                } else {
                    String::new()
                };
                write(&format!("{dir}ring-ref{number}"), &reference.to_string());
            }
            let (channel, port) = host.allocate_channel(DOMAIN).unwrap();
            write(&format!("{dir}event-channel"), &port.to_string());
            let memory = Arc::new(pages);
            let ring = FrontRing::new(Shared(memory.clone()), choice.abi).unwrap();
            rings.push(Ring {
                ring,
                memory,
                channel,
            });
        }
        let (data, references) = host.grant(DOMAIN, 512, Access::ReadWrite).unwrap();
        let (lists, list_references) = host.grant(DOMAIN, 8, Access::ReadWrite).unwrap();
        Self {
            host: host.clone(),
            store,
            abi: choice.abi,
            rings,
            data,
            references,
            lists,
            list_references,
        }
    }

    pub fn set_state(&mut self, state: &str) {
        self.store.write(&format!("{FRONT}/state"), state).unwrap();
    }

    pub fn offers(&mut self) -> BackOffer {
        let mut offer = BackOffer::default();
        for node in BackOffer::NODES {
            let path = format!("/local/domain/0/{BACK}/{node}");
            if let Some(value) = self.store.read(&path).unwrap() {
                offer.set(node, &value).unwrap();
            }
        }
        offer
    }

    /// Returns a segment in a page for data.
    pub fn segment(&self, page: usize, first: u8, last: u8) -> WireSegment {
        WireSegment {
            gref: self.references[page],
            first,
            last,
        }
    }

    /// Returns a request for segments, indirect if they do not fit into a slot.
    pub fn request(
        &self,
        operation: u8,
        id: u64,
        sector: u64,
        segments: &[WireSegment],
    ) -> WireRequest {
        if segments.len() <= DIRECT_SEGMENTS {
            return direct(operation, id, sector, segments);
        }
        for (number, segment) in segments.iter().enumerate() {
            let [gref, range] = segment.encode();
            self.lists.store(number * 2, gref);
            self.lists.store(number * 2 + 1, range);
        }
        let mut grefs = [0; INDIRECT_PAGES];
        grefs[0] = self.list_references[0];
        WireRequest::Indirect(IndirectRequest {
            operation,
            nr_segments: segments.len() as u16,
            handle: 0,
            id,
            sector,
            grefs,
        })
    }
}

/// Returns a request with its segments in the slot.
pub fn direct(operation: u8, id: u64, sector: u64, segments: &[WireSegment]) -> WireRequest {
    let mut all = [WireSegment::EMPTY; DIRECT_SEGMENTS];
    all[..segments.len()].copy_from_slice(segments);
    WireRequest::Rw(RwRequest {
        operation,
        nr_segments: segments.len() as u8,
        handle: 0,
        id,
        sector,
        segments: all,
    })
}

/// Returns a flush.
pub fn flush(id: u64) -> WireRequest {
    direct(op::FLUSH_DISKCACHE, id, 0, &[])
}

pub fn okay(response: Response) {
    assert_eq!(response.status, Status::Okay, "request {}", response.id);
}

/// Numbers that look random.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns a number below a limit.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) % limit
    }
}
