// SPDX-License-Identifier: GPL-2.0-only

//! `rblk check`: settings of this host that cause trouble, and the command that fixes each.

mod images;

use crate::exit::{self, Error};
use serde::Serialize;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// The number of pages that Xen lets a domain map by default, of all other domains together.
const DEFAULT_MAPPINGS: u64 = 262_144;

/// The number of pages that one frame of `gnttab_max_maptrack_frames` is for.
const MAPPINGS_OF_FRAME: u64 = 256;

/// A setting that causes trouble.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
struct Finding {
    /// The trouble, and the setting that causes it.
    cause: String,
    /// A command that changes the setting.
    fix: String,
}

/// The files of a host, below a root directory.
struct Host {
    root: PathBuf,
}

/// A kind of trouble: returns what is found of it on a host.
type Check = fn(&Host) -> Vec<Finding>;

const CHECKS: [Check; 12] = [
    unused_backend,
    unused_frontend,
    mappings,
    ring_pages,
    lvm,
    mdadm,
    discard,
    io_uring,
    standard_input,
    scripts,
    agent,
    images::images,
];

/// Prints the findings. Fails if there are any.
pub fn run(json: bool) -> Result<(), Error> {
    let findings = Host::new("/").findings();
    if json {
        exit::print_json(&findings)?;
    } else {
        exit::print(&text(&findings))?;
    }
    if findings.is_empty() {
        return Ok(());
    }
    Err(Error::Findings)
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for Finding { cause, fix } in findings {
        // A string takes everything.
        let _ = writeln!(text, "{cause}\n    {fix}");
    }
    if findings.is_empty() {
        text.push_str("no setting causes trouble\n");
    }
    text
}

fn finding(cause: impl Into<String>, fix: impl Into<String>) -> Vec<Finding> {
    vec![Finding {
        cause: cause.into(),
        fix: fix.into(),
    }]
}

impl Host {
    fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn findings(&self) -> Vec<Finding> {
        CHECKS.iter().flat_map(|check| check(self)).collect()
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// Reads a file without the space around its text. One that cannot be read is empty.
    fn read(&self, path: &str) -> String {
        let text = fs::read_to_string(self.path(path)).unwrap_or_default();
        text.trim().to_owned()
    }

    fn number(&self, path: &str) -> Option<u64> {
        self.read(path).parse().ok()
    }

    /// Lists the names in a directory, sorted. One that cannot be read is empty.
    fn names(&self, path: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(path)).into_iter().flatten();
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// Returns `true` if the running kernel has a module that `modprobe` finds.
    fn has_module(&self, name: &str) -> bool {
        let release = self.read("proc/sys/kernel/osrelease");
        let list = self.read(&format!("lib/modules/{release}/modules.dep"));
        list.lines().any(|line| {
            let file = line.split(':').next().unwrap_or_default();
            let file = Path::new(file).file_name().and_then(|name| name.to_str());
            file.is_some_and(|file| file.split('.').next() == Some(name))
        })
    }

    /// Returns the names of the disks that a backend in the kernel serves.
    fn kernel_disks(&self) -> Vec<String> {
        let names = self.names("sys/bus/xen-backend/devices").into_iter();
        names.filter(|name| name.starts_with("vbd-")).collect()
    }

    /// Returns the name of the backend module that is loaded.
    fn backend(&self) -> Option<&'static str> {
        let modules = ["rblkback", "xen_blkback"].into_iter();
        let mut loaded = modules.filter(|name| self.exists(&format!("sys/module/{name}")));
        loaded.next()
    }

    /// Returns the lines of a configuration file that are no comments.
    fn settings(&self, path: &str) -> Vec<String> {
        let text = self.read(path);
        let lines = text.lines().map(str::trim);
        lines
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    }
}

/// Finds a C driver that is loaded although ours is installed.
fn unused(host: &Host, ours: &str, other: &str, fix: &str) -> Vec<Finding> {
    let loaded = |name: &str| host.exists(&format!("sys/module/{}", name.replace('-', "_")));
    if !loaded(other) || loaded(ours) || !host.has_module(ours) {
        return Vec::new();
    }
    finding(
        format!("{ours} is installed for this kernel, and {other} is loaded"),
        fix,
    )
}

fn unused_backend(host: &Host) -> Vec<Finding> {
    let fix = "detach the disks of all guests, then: modprobe -r xen-blkback && modprobe rblkback";
    unused(host, "rblkback", "xen-blkback", fix)
}

fn unused_frontend(host: &Host) -> Vec<Finding> {
    let fix = "update-initramfs -u && reboot";
    unused(host, "rblkfront", "xen-blkfront", fix)
}

/// Finds disks whose rings may map more pages than Xen allows.
fn mappings(host: &Host) -> Vec<Finding> {
    let Some(module) = host.backend() else {
        return Vec::new();
    };
    let parameter = |name: &str| host.number(&format!("sys/module/{module}/parameters/{name}"));
    let pages = parameter("max_persistent_grants").unwrap_or_default()
        + parameter("max_buffer_pages").unwrap_or_default();
    let queues = parameter("max_queues").unwrap_or(1).max(1);
    let disks = u64::try_from(host.kernel_disks().len()).unwrap_or(u64::MAX);
    let needed = disks.saturating_mul(queues).saturating_mul(pages);
    let configured = ["etc/default/grub", "etc/default/grub.d/xen.cfg"]
        .iter()
        .any(|path| host.read(path).contains("gnttab_max_maptrack_frames="));
    if needed <= DEFAULT_MAPPINGS || configured {
        return Vec::new();
    }
    let frames = needed.div_ceil(MAPPINGS_OF_FRAME);
    finding(
        format!(
            "{disks} disks with up to {queues} rings may map {needed} pages, and Xen allows {DEFAULT_MAPPINGS} by default"
        ),
        format!(
            "echo 'GRUB_CMDLINE_XEN=\"$GRUB_CMDLINE_XEN gnttab_max_maptrack_frames={frames}\"' >>/etc/default/grub.d/xen.cfg && update-grub && reboot"
        ),
    )
}

/// Finds a backend that allows only rings of one page.
fn ring_pages(host: &Host) -> Vec<Finding> {
    let Some(module) = host.backend() else {
        return Vec::new();
    };
    let parameter = format!("sys/module/{module}/parameters/max_ring_page_order");
    if host.number(&parameter) != Some(0) {
        return Vec::new();
    }
    finding(
        "max_ring_page_order=0 limits each ring to 32 requests in flight",
        format!("echo 4 >/{parameter}, for disks that are attached later"),
    )
}

/// Finds an LVM that looks for physical volumes of guests.
fn lvm(host: &Host) -> Vec<Finding> {
    const FILE: &str = "etc/lvm/lvm.conf";
    let settings = host.settings(FILE);
    let is_set = |name: &str| {
        let mut names = settings.iter().map(|line| line.split('=').next());
        names.any(|found| found.map(str::trim) == Some(name))
    };
    let mut findings = Vec::new();
    if settings
        .iter()
        .any(|line| line.replace(' ', "") == "scan_lvs=1")
    {
        findings.extend(finding(
            "scan_lvs = 1 in lvm.conf: this domain finds the volume groups inside the disks of guests",
            "sed -i 's/^\\([[:space:]]*\\)scan_lvs = 1/\\1scan_lvs = 0/' /etc/lvm/lvm.conf",
        ));
    }
    let loop_devices = host.kernel_disks().iter().any(|disk| {
        let device = host.read(&format!(
            "sys/bus/xen-backend/devices/{disk}/physical_device"
        ));
        device.starts_with("7:")
    });
    if host.exists(FILE) && loop_devices && !is_set("global_filter") {
        findings.extend(finding(
            "LVM has no global_filter: this domain finds volume groups inside disks of guests that are loop devices",
            "sed -i 's,^devices {,devices {\\n\\tglobal_filter = [ \"r|^/dev/loop|\" ],' /etc/lvm/lvm.conf && lvmconfig --validate",
        ));
    }
    findings
}

/// Finds an mdadm that assembles arrays of guests.
fn mdadm(host: &Host) -> Vec<Finding> {
    const FILE: &str = "etc/mdadm/mdadm.conf";
    let settings = host.settings(FILE);
    if !host.exists(FILE) || settings.iter().any(|line| line.starts_with("AUTO ")) {
        return Vec::new();
    }
    finding(
        "mdadm.conf has no line AUTO: this domain assembles the arrays inside the disks of guests",
        "sed -i '1i AUTO -all' /etc/mdadm/mdadm.conf && update-initramfs -u",
    )
}

/// Finds disks of guests on a device that cannot discard.
fn discard(host: &Host) -> Vec<Finding> {
    let mut findings = Vec::new();
    for disk in host.kernel_disks() {
        let device = host.read(&format!(
            "sys/bus/xen-backend/devices/{disk}/physical_device"
        ));
        let Some(device) = decimal(&device) else {
            continue;
        };
        let limit = host.number(&format!("sys/dev/block/{device}/queue/discard_max_bytes"));
        if limit == Some(0) {
            let name = host.read(&format!("sys/dev/block/{device}/uevent"));
            let name = name
                .lines()
                .find_map(|line| line.strip_prefix("DEVNAME="))
                .unwrap_or(&device)
                .to_owned();
            findings.extend(finding(
                format!("{disk}: /dev/{name} cannot discard, so blocks that the guest frees stay allocated"),
                format!("lsblk --discard /dev/{name}, and enable discard in the layers below"),
            ));
        }
    }
    findings
}

/// Returns the decimal numbers of a device, which the backend writes in hexadecimal.
fn decimal(device: &str) -> Option<String> {
    let (major, minor) = device.split_once(':')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    Some(format!("{}:{}", number(major)?, number(minor)?))
}

/// Finds a kernel that refuses io_uring, without which `rblktap` opens no raw image.
fn io_uring(host: &Host) -> Vec<Finding> {
    match host.number("proc/sys/kernel/io_uring_disabled") {
        // With 1, root may use it, and rblktap is root while it opens an image.
        None | Some(0..=1) => Vec::new(),
        Some(_) => finding(
            "kernel.io_uring_disabled is 2: rblktap cannot open images",
            "echo kernel.io_uring_disabled=0 >/etc/sysctl.d/60-rblk.conf && sysctl --system",
        ),
    }
}

/// Finds a missing `/dev/stdin`, for which Xen's script `block-tap` waits without end.
fn standard_input(host: &Host) -> Vec<Finding> {
    if !host.exists("etc/xen/scripts/block-tap") || host.path("dev/stdin").is_symlink() {
        return Vec::new();
    }
    finding(
        "/dev/stdin is missing: Xen's script block-tap never ends",
        "ln -s /proc/self/fd/0 /dev/stdin",
    )
}

/// Finds commands that Xen calls and that are not ours, or not there.
fn scripts(host: &Host) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !host.exists("etc/xen/scripts") {
        return findings;
    }
    for link in ["etc/xen/scripts/block-rblk", "usr/sbin/tap-ctl"] {
        let target = fs::canonicalize(host.path(link)).ok();
        let target = target.as_deref().and_then(Path::file_name);
        if target.is_none_or(|name| name != "rblk") {
            findings.extend(finding(
                format!("/{link} is not rblk: disks with backendtype=tap cannot be attached"),
                format!("ln -sfn /usr/bin/rblk /{link}"),
            ));
        }
    }
    if !host.exists("usr/bin/qemu-storage-daemon") {
        findings.extend(finding(
            "qemu-storage-daemon is not installed: qcow2, VHD, VHDX and VMDK images cannot be served",
            "apt install qemu-utils",
        ));
    }
    findings
}

/// Finds an agent that does not run, or not after the next boot.
fn agent(host: &Host) -> Vec<Finding> {
    const UNIT: &str = "lib/systemd/system/rblkd.service";
    if !host.exists(UNIT) && !host.exists(&format!("usr/{UNIT}")) {
        return Vec::new();
    }
    let enabled = host.path("etc/systemd/system/multi-user.target.wants/rblkd.service");
    if !enabled.is_symlink() {
        return finding(
            "rblkd does not start at boot: disks with backendtype=tap cannot be attached then",
            "systemctl enable --now rblkd",
        );
    }
    if !host.exists("run/rblk/sock") {
        return finding(
            "rblkd does not run: no disk with backendtype=tap can be attached",
            "systemctl start rblkd; systemctl status rblkd",
        );
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A host whose files are those named.
    pub(super) fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let host = Host::new(dir.path());
        (dir, host)
    }

    fn causes(files: &[(&str, &str)]) -> String {
        let (_dir, host) = host(files);
        text(&host.findings())
    }

    #[test]
    fn a_host_without_xen_has_no_trouble() {
        assert_eq!(causes(&[]), "no setting causes trouble\n");
    }

    #[test]
    fn a_driver_that_is_installed_and_not_used_is_found() {
        let files = [
            ("proc/sys/kernel/osrelease", "7.3\n"),
            (
                "lib/modules/7.3/modules.dep",
                "kernel/xen-blkfront.ko.xz:\nupdates/dkms/rblkfront.ko.xz:\n",
            ),
            ("sys/module/xen_blkfront/refcnt", "1"),
        ];
        let found = causes(&files);
        assert!(found.starts_with("rblkfront is installed"), "{found}");
        assert!(found.contains("\n    update-initramfs -u"), "{found}");
        let used = [&files[..], &[("sys/module/rblkfront/refcnt", "1")]].concat();
        assert_eq!(causes(&used), causes(&[]));
    }

    #[test]
    fn disks_that_may_map_too_many_pages_are_found() {
        let parameters = "sys/module/rblkback/parameters";
        let mut files = vec![
            (
                format!("{parameters}/max_persistent_grants"),
                "1056".to_owned(),
            ),
            (format!("{parameters}/max_buffer_pages"), "1024".to_owned()),
            (format!("{parameters}/max_queues"), "2".to_owned()),
            (format!("{parameters}/max_ring_page_order"), "0".to_owned()),
        ];
        files.extend((0..64).map(|number| {
            let device = format!("sys/bus/xen-backend/devices/vbd-{number}-51712/physical_device");
            (device, String::new())
        }));
        let files: Vec<(&str, &str)> = files
            .iter()
            .map(|(path, text)| (path.as_str(), text.as_str()))
            .collect();
        let found = causes(&files);
        assert!(found.contains("may map 266240 pages"), "{found}");
        assert!(found.contains("gnttab_max_maptrack_frames=1040"), "{found}");
        assert!(found.contains("max_ring_page_order=0"), "{found}");
    }

    #[test]
    fn a_volume_manager_that_looks_into_guests_is_found() {
        let found = causes(&[
            (
                "etc/lvm/lvm.conf",
                "devices {\n\t# scan_lvs = 0\n\tscan_lvs = 1\n}\n",
            ),
            (
                "sys/bus/xen-backend/devices/vbd-1-51712/physical_device",
                "7:0",
            ),
            ("sys/dev/block/7:0/queue/discard_max_bytes", "0"),
            ("sys/dev/block/7:0/uevent", "MAJOR=7\nDEVNAME=loop0\n"),
            ("etc/mdadm/mdadm.conf", "# AUTO -all\nHOMEHOST <system>\n"),
        ]);
        for cause in [
            "scan_lvs = 1",
            "no global_filter",
            "no line AUTO",
            "/dev/loop0 cannot discard",
        ] {
            assert!(found.contains(cause), "{cause}: {found}");
        }
        let found = causes(&[
            (
                "etc/lvm/lvm.conf",
                "devices {\n\tglobal_filter = [ \"r|^/dev/loop|\" ]\n}\n",
            ),
            ("etc/mdadm/mdadm.conf", "AUTO -all\n"),
        ]);
        assert_eq!(found, causes(&[]));
    }

    #[test]
    fn missing_programs_and_links_are_found() {
        let (dir, host) = host(&[
            ("etc/xen/scripts/block-tap", ""),
            ("proc/sys/kernel/io_uring_disabled", "2"),
            ("usr/lib/systemd/system/rblkd.service", ""),
            ("usr/bin/rblk", ""),
        ]);
        assert_eq!(host.findings().len(), 6, "{}", text(&host.findings()));
        let root = dir.path();
        fs::create_dir_all(root.join("usr/sbin")).unwrap();
        symlink("../bin/rblk", root.join("usr/sbin/tap-ctl")).unwrap();
        symlink(
            "../../../usr/bin/rblk",
            root.join("etc/xen/scripts/block-rblk"),
        )
        .unwrap();
        fs::create_dir_all(root.join("dev")).unwrap();
        symlink("/proc/self/fd/0", root.join("dev/stdin")).unwrap();
        fs::write(root.join("usr/bin/qemu-storage-daemon"), "").unwrap();
        fs::write(root.join("proc/sys/kernel/io_uring_disabled"), "0").unwrap();
        let wants = root.join("etc/systemd/system/multi-user.target.wants");
        fs::create_dir_all(&wants).unwrap();
        symlink("/x", wants.join("rblkd.service")).unwrap();
        assert_eq!(
            text(&host.findings()),
            "rblkd does not run: no disk with backendtype=tap can be attached\n    \
             systemctl start rblkd; systemctl status rblkd\n"
        );
    }

    #[test]
    fn numbers_of_devices_are_hexadecimal_for_the_backend() {
        assert_eq!(decimal("fd:1f").as_deref(), Some("253:31"));
        assert_eq!(decimal(""), None);
    }
}
