// SPDX-License-Identifier: GPL-2.0-only

//! A confined thread can do nothing but serve its disk, and a program of QEMU nothing but use its
//! files. Run by root only.
//!
//! In a process of its own, without the threads of a test harness: it changes its limits.

mod common;

use blkif::wire::op;
use common::*;
use engine::Connect;
use engine::Protocol;
use engine::Server;
use engine::Uri;
use nix::sched::unshare;
use nix::sched::CloneFlags;
use nix::sys::ptrace;
use rblktap::confine::confine;
use rblktap::confine::confine_thread;
use rblktap::confine::Error;
use rustix::process::kill_process;
use rustix::process::test_kill_process;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::thread::gettid;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::fs::File;
use std::fs::Permissions;
use std::io;
use std::io::Read;
use std::io::Write;
use std::net::TcpListener;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::sync::mpsc;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// The user of the confined thread.
const USER: u32 = 1_895_825_413;

const SIZE: u64 = 8 << 20;

/// The results of what a confined thread has tried, by what it was.
type Tried = Vec<(&'static str, io::Result<()>)>;

/// Tries what a process that was taken over would try.
fn try_all(socket: &Path, port: u16) -> Tried {
    let no_children = || Command::new("/bin/true").spawn().map(drop);
    let signal = || Ok(test_kill_process(Pid::INIT)?);
    let user = rustix::process::Uid::ROOT;
    let root = || Ok(rustix::thread::set_thread_uid(user)?);
    let trace = || Ok(ptrace::attach(nix::unistd::Pid::parent())?);
    vec![
        ("open a file", File::open("/etc/passwd").map(drop)),
        ("create a file", File::create("/file").map(drop)),
        ("list a directory", fs::read_dir("/").map(drop)),
        ("connect to a socket", UnixStream::connect(socket).map(drop)),
        (
            "connect to a port",
            TcpStream::connect(("127.0.0.1", port)).map(drop),
        ),
        ("listen", TcpListener::bind("127.0.0.1:0").map(drop)),
        ("run a program", no_children()),
        ("send a signal", signal()),
        ("become root", root()),
        ("trace a process", trace()),
    ]
}

/// Returns the threads of this process.
fn threads() -> BTreeSet<OsString> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    tasks.map(|task| task.unwrap().file_name()).collect()
}

/// Returns a line of the file `status` in a directory of `/proc`.
fn status(task: &Path, name: &str) -> String {
    let text = fs::read_to_string(task.join("status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

fn task(thread: Pid) -> PathBuf {
    Path::new("/proc/self/task").join(thread.to_string())
}

fn check_layers(task: &Path, user: u32, capabilities: &str) {
    let user = vec![user.to_string(); 4].join(" ");
    assert_eq!(status(task, "Uid:"), user);
    assert_eq!(status(task, "Gid:"), user);
    assert_eq!(status(task, "Groups:"), "");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(status(task, set), capabilities, "{set}");
    }
    assert_eq!(status(task, "NoNewPrivs:"), "1");
    assert_eq!(status(task, "Seccomp:"), "2");
}

fn check_network(task: &Path) {
    let namespace = |task: &Path| fs::read_link(task.join("ns/net")).unwrap();
    assert_ne!(namespace(task), namespace(Path::new("/proc/self")));
}

/// Writes, reads and verifies, with all kinds of requests.
fn verify(front: &mut Front) {
    for id in 0..16 {
        let pages = [1, 8, 11, 40][id % 4];
        let ring = id % front.rings.len();
        let segments: Vec<_> = (0..pages).map(|page| front.segment(page, 0, 7)).collect();
        let data = vec![id as u8 + 1; pages * 4096];
        front.data.write(0, &data);
        let sector = id as u64 * 320;
        let mut call = |operation| {
            let request = front.request(operation, id as u64, sector, &segments);
            okay(front.rings[ring].call(request));
        };
        call(op::WRITE);
        call(op::READ);
        let mut read = vec![0; data.len()];
        front.data.read(0, &mut read);
        assert!(read == data);
        okay(front.rings[ring].call(flush(99)));
    }
    let discard = blkif::wire::WireRequest::Discard(blkif::wire::DiscardRequest {
        flag: 0,
        handle: 0,
        id: 7,
        sector: 0,
        nr_sectors: 320,
    });
    if front.offers().discard {
        okay(front.rings[0].call(discard));
    }
}

fn serve_confined(dir: &Path) {
    let image = dir.join("image");
    File::create(&image).unwrap().set_len(SIZE).unwrap();
    let uri: Uri = format!("raw:{}", image.display()).parse().unwrap();
    let engine = engine::open(&uri, &engine::Options::default()).unwrap();
    let root = dir.join("empty");
    fs::create_dir(&root).unwrap();
    let socket = dir.join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap();
    let number = port.local_addr().unwrap().port();
    let mut toolstack = Toolstack::new("w");
    let store = toolstack.host.xenstore().unwrap();
    let (sender, tried) = mpsc::channel();
    let empty = root.clone();
    let first = move || {
        // The root directory of the other threads stays.
        unshare(CloneFlags::CLONE_FS).unwrap();
        assert!(matches!(confine(USER, &empty), Err(Error::Threads(2..))));
        confine_thread(USER, &empty).unwrap();
        sender.send((gettid(), try_all(&socket, number))).unwrap();
    };
    let served = serve_after(&mut toolstack, store, engine, &Options::new(dir), first);
    let (thread, tried) = tried.recv().unwrap();
    for (what, result) in tried {
        let error = result.expect_err(what);
        assert_eq!(
            error.kind(),
            io::ErrorKind::PermissionDenied,
            "{what}: {error}"
        );
    }
    check_layers(&task(thread), USER, "0000000000000000");
    check_network(&task(thread));
    assert_eq!(fs::read_link(task(thread).join("root")).unwrap(), root);

    let choice = Choice {
        queues: 4,
        order: 2,
        ..Choice::PLAIN
    };
    let mut front = Front::connect(&mut toolstack, choice);
    verify(&mut front);
    let answers: [(&str, &str, serde_json::Value); 3] = [
        ("pause", "paused", true.into()),
        ("resume", "paused", false.into()),
        ("resize", "sectors", (SIZE / 256).into()),
    ];
    for (command, name, value) in answers {
        File::options()
            .write(true)
            .open(&image)
            .unwrap()
            .set_len(SIZE * 2)
            .unwrap();
        assert_eq!(control(dir, command)[name], value);
    }
    verify(&mut front);
    let emulated = emulated(dir);
    write_emulated(&*emulated, b"boot");
    let found = fs::read(&image).unwrap();
    assert_eq!(&found[512..516], b"boot");
    // Connects again.
    front.set_state("5");
    toolstack.wait_state("5");
    front.set_state("6");
    toolstack.wait_state("6");
    front.set_state("1");
    let mut front = Front::connect(&mut toolstack, choice);
    verify(&mut front);
    assert_eq!(control(dir, "stats")["counters"]["errors"], 0);
    toolstack.start_detach();
    front.set_state("6");
    served.join().unwrap().unwrap();
}

/// The work of a thread that is not confined.
type Call = Box<dyn FnOnce(&Server) + Send>;

/// The server of an image in a thread that is not confined, as the monitor has it.
struct Unconfined(mpsc::Sender<Call>);

impl Unconfined {
    fn start(server: Server) -> Self {
        let (sender, calls) = mpsc::channel::<Call>();
        thread::spawn(move || calls.iter().for_each(|call| call(&server)));
        Self(sender)
    }

    fn call<T: Send + 'static>(&self, call: impl FnOnce(&Server) -> T + Send + 'static) -> T {
        let (sender, result) = mpsc::channel();
        let call: Call = Box::new(move |server| sender.send(call(server)).unwrap());
        self.0.send(call).unwrap();
        result.recv().unwrap()
    }
}

impl Connect for Unconfined {
    fn connect(&self, protocol: Protocol, is_dirty: bool) -> engine::Result<OwnedFd> {
        self.call(move |server| server.connect(protocol, is_dirty))
    }

    fn resize(&self, size: u64) -> engine::Result<()> {
        self.call(move |server| server.resize(size))
    }

    fn stop(&self) -> engine::Result<()> {
        self.call(Server::stop)
    }
}

/// Returns the processes that serve an image.
fn daemons(image: &Path) -> Vec<i32> {
    let image = image.to_str().unwrap();
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .filter(|id| {
            fs::read_to_string(format!("/proc/{id}/cmdline"))
                .is_ok_and(|line| line.starts_with("qemu-storage-daemon") && line.contains(image))
        })
        .collect()
}

/// Runs `qemu-img`, which must succeed.
fn qemu_img(args: &[&str]) {
    let status = Command::new("qemu-img").args(args).status().unwrap();
    assert!(status.success(), "{args:?}");
}

/// Creates an image in `dir` with these options of `qemu-img create`. One of qcow2 has two backing
/// files and a snapshot.
fn create_image(dir: &Path, format: &str, options: &[&str]) -> PathBuf {
    let name = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let (image, size) = (name("image"), SIZE.to_string());
    let secret = format!("secret,id=key,file={}", name("key"));
    fs::write(dir.join("key"), "passphrase").unwrap();
    let mut create = vec!["create", "-q", "--object", &secret, "-f", format];
    create.extend(options);
    if format == "qcow2" {
        for (backing, file) in [("base", "middle"), ("middle", "image")] {
            let (backing, file) = (name(backing), name(file));
            if file == name("middle") {
                qemu_img(&["create", "-q", "-f", "qcow2", &backing, &size]);
            }
            qemu_img(&[
                "create", "-q", "-f", "qcow2", "-b", &backing, "-F", "qcow2", &file,
            ]);
        }
        qemu_img(&["snapshot", "-c", "first", &image]);
    } else {
        create.extend([image.as_str(), &size]);
        qemu_img(&create);
    }
    image.into()
}

/// The launcher of QEMU's programs, which runs them as the user `USER + 1`.
fn launcher(root: &Path) -> Vec<OsString> {
    let mut launcher = rblktap::launch::launcher(USER + 1, root);
    // It names the program that calls it, which is this test.
    launcher[0] = env!("CARGO_BIN_EXE_rblktap").into();
    launcher
}

/// A confined thread serves an image with a format, through a confined daemon: also after the
/// daemon was killed, and with a larger image.
fn serve_format_confined(format: &str, options: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let image = create_image(dir, format, options);
    let uri: Uri = format!("{format}:{}", image.display()).parse().unwrap();
    let root = dir.join("empty");
    fs::create_dir(&root).unwrap();
    let options = engine::Options {
        key_file: (format == "luks").then(|| dir.join("key")),
        launcher: launcher(&root),
        disk: Some(7),
        runtime_dir: dir.to_owned(),
        ..engine::Options::default()
    };
    let server = Server::start(&uri, &options).unwrap().unwrap();
    let server: Arc<dyn Connect> = Arc::new(Unconfined::start(server));
    let before = threads();
    let engine = engine::open_with(&uri, &options, Some(server)).unwrap();
    // A thread of it would not be confined.
    assert!(threads().is_subset(&before));
    let mut toolstack = Toolstack::new("w");
    let store = toolstack.host.xenstore().unwrap();
    let first = move || {
        unshare(CloneFlags::CLONE_FS).unwrap();
        confine_thread(USER, &root).unwrap();
    };
    let served = serve_after(&mut toolstack, store, engine, &Options::new(dir), first);
    let choice = Choice {
        queues: 4,
        ..Choice::PLAIN
    };
    let mut front = Front::connect(&mut toolstack, choice);
    for _ in 0..2 {
        verify(&mut front);
        okay(front.rings[0].call(flush(99)));
        let [daemon] = daemons(&image)[..] else {
            panic!("there is not one daemon");
        };
        let process = PathBuf::from(format!("/proc/{daemon}"));
        check_layers(&process, USER + 1, "0000000000000002");
        check_network(&process);
        kill_process(Pid::from_raw(daemon).unwrap(), Signal::KILL).unwrap();
        while !daemons(&image).is_empty() {
            thread::sleep(Duration::from_millis(1));
        }
    }
    verify(&mut front);
    if ["qcow2", "luks"].contains(&format) {
        let resize = format!(r#"{{"command":"resize","size":{}}}"#, SIZE * 2);
        assert_eq!(control_with(dir, &resize)["sectors"], SIZE / 256);
        verify(&mut front);
    }
    // The daemon writes its caches before the process is replaced.
    assert_eq!(control(dir, "drain")["paused"], true);
    wait_for("the flush", || control(dir, "stats")["paused"] == true);
    control(dir, "resume");
    verify(&mut front);
    assert_eq!(control(dir, "stats")["counters"]["errors"], 0);
    toolstack.start_detach();
    front.set_state("6");
    served.join().unwrap().unwrap();
    assert!(daemons(&image).is_empty());
    // The daemon has said that it has written its caches.
    for entry in fs::read_dir(dir).unwrap() {
        assert!(!entry.unwrap().path().join("pid").exists());
    }
}

fn serve_formats_confined() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        println!("skipped: qemu-img is not installed");
        return;
    }
    for (format, options) in [
        ("qcow2", &[][..]),
        ("vpc", &["-o", "force_size=on"]),
        ("vpc", &["-o", "force_size=on,subformat=fixed"]),
        ("vhdx", &[]),
        ("vmdk", &[]),
        ("luks", &["-o", "key-secret=key,iter-time=10"]),
    ] {
        serve_format_confined(format, options);
    }
}

/// Runs a program as QEMU's programs are run, with `input`. Returns what it prints, and whether it
/// has succeeded.
fn launched(root: &Path, files: [&Path; 2], program: &[&str], input: &str) -> (String, bool) {
    let launcher = launcher(root);
    let mut child = Command::new(&launcher[0])
        .args(&launcher[1..])
        .arg("--read")
        .arg(files[0])
        .arg("--write")
        .arg(files[1])
        .arg("--")
        .args(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It may have ended without reading.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    (text, output.status.success())
}

/// A program that is launched uses its files, and nothing else.
fn launch_confined(dir: &Path) {
    let root = dir.join("root");
    let (read, write) = (dir.join("read"), dir.join("write"));
    fs::create_dir(&root).unwrap();
    for file in [&read, &write] {
        fs::write(file, "before\n").unwrap();
        fs::set_permissions(file, Permissions::from_mode(0o600)).unwrap();
    }
    let (read_name, write_name) = (read.to_str().unwrap(), write.to_str().unwrap());
    let run = |program: &[&str]| launched(&root, [&read, &write], program, "after\n");
    let shown = run(&["cat", read_name, write_name]);
    assert_eq!(shown, ("before\nbefore\n".to_owned(), true));
    assert!(run(&["tee", write_name]).1);
    for path in [read_name, "/usr/new", "/new"] {
        assert!(!run(&["tee", path]).1, "{path}");
    }
    assert_eq!(fs::read_to_string(&read).unwrap(), "before\n");
    assert_eq!(fs::read_to_string(&write).unwrap(), "after\n");
    assert_eq!(run(&["ls", "-d", "/usr"]).0, "/usr\n");
    assert_eq!(run(&["ls", "/dev"]).0, "null\n");
    assert!(run(&["tee", "/dev/null"]).1);
    for path in ["/etc", "/proc", "/sys", "/run", "/root"] {
        assert_eq!(run(&["ls", "-d", path]), (String::new(), false));
    }
    let started = run(&["xargs", "echo", "started"]);
    assert_eq!(started, (String::new(), false), "a process was started");
    assert!(fs::read_dir(&root).unwrap().next().is_none());
}

/// A program that is launched ends with the thread that has started it, as `qemu-storage-daemon`
/// does when its monitor is killed.
fn end_with_thread(root: PathBuf) {
    let start = move || {
        let launcher = launcher(&root);
        let mut child = Command::new(&launcher[0])
            .args(&launcher[1..])
            .args(["--", "sh", "-c", "echo started; exec sleep 1000"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0; 8];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut line)
            .unwrap();
        child
    };
    let mut child = thread::spawn(start).join().unwrap();
    let signal = Signal::TERM.as_raw();
    assert_eq!(child.wait().unwrap().signal(), Some(signal));
}

/// The variable with the directory of the process that is confined as one with Ceph's library.
const LIBRARY_DIR: &str = "RBLKIF_TEST_LIBRARY_DIR";

/// A process with a library is confined with all its threads, and can use the network.
fn confine_threads(dir: &Path) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sender, waiting) = mpsc::channel::<()>();
    let root = dir.join("empty");
    rblktap::cluster::prepare(&root).unwrap();
    let thread = thread::spawn(move || waiting.recv());
    rblktap::cluster::confine(USER, &root).unwrap();
    TcpStream::connect(("127.0.0.1", port)).unwrap();
    fs::read_dir("/usr").unwrap();
    let tried = [
        ("read a file", File::open("/etc/passwd").map(drop)),
        ("find a process", File::open("/proc/1/status").map(drop)),
        ("create a file", File::create("/usr/file").map(drop)),
        ("listen", UnixListener::bind("/socket").map(drop)),
        ("run a program", Command::new("/bin/true").spawn().map(drop)),
    ];
    for (what, result) in tried {
        assert!(result.is_err(), "the process could {what}");
    }
    println!("confined");
    let mut line = String::new();
    io::stdin().read_line(&mut line).unwrap();
    drop(sender);
    let _ = thread.join().unwrap();
}

/// Confines a process as one with a library, and looks at each thread of it.
fn library_confined(dir: &Path) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .env(LIBRARY_DIR, dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 9];
    let output = child.stdout.as_mut().unwrap();
    output.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"confined\n");
    let process = PathBuf::from(format!("/proc/{}", child.id()));
    let tasks: Vec<_> = fs::read_dir(process.join("task")).unwrap().collect();
    assert_eq!(tasks.len(), 2);
    for task in tasks {
        check_layers(&task.unwrap().path(), USER, "0000000000000000");
    }
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}

fn main() {
    if let Some(dir) = std::env::var_os(LIBRARY_DIR) {
        confine_threads(Path::new(&dir));
        return;
    }
    if !rustix::process::getuid().is_root() {
        println!("skipped: only root can confine a process");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    serve_confined(dir.path());
    serve_formats_confined();
    library_confined(dir.path());
    launch_confined(dir.path());
    end_with_thread(dir.path().join("root"));
    println!("a confined process serves its disk, and can do nothing else");
}
