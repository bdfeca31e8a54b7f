// SPDX-License-Identifier: GPL-2.0-only

//! Root directories of confined processes, which have the files that these need.

use nix::mount::mount;
use nix::mount::MsFlags;
use rustix::process::chdir;
use rustix::process::chroot;
use std::fs;
use std::fs::File;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::path::PathBuf;

/// The directories with the programs and libraries of the system.
const SYSTEM: [&str; 4] = ["/usr", "/bin", "/lib", "/lib64"];

/// A device that programs expect. QEMU does not lock images without it.
const NULL: &str = "/dev/null";

/// The flags of mounts without devices.
const RESTRICTED: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// Shows the programs and libraries of the system, `/dev/null`, and these files and directories,
/// below `root`, an empty directory. Only what `write` names can be written.
///
/// Context: the process has a mount namespace of its own, and is root.
pub(crate) fn fill<'a>(
    root: &Path,
    read: impl IntoIterator<Item = &'a PathBuf>,
    write: impl IntoIterator<Item = &'a PathBuf>,
) -> io::Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let options = Some("size=1m,mode=755");
    mount(Some("tmpfs"), root, Some("tmpfs"), RESTRICTED, options)?;
    for path in SYSTEM.map(Path::new) {
        match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.is_symlink() => {
                symlink(fs::read_link(path)?, place(root, path)?)?;
            }
            Ok(_) => show(root, path, Some(RESTRICTED))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    show(root, Path::new(NULL), Some(MsFlags::MS_NOSUID))?;
    for path in read {
        show(root, path, Some(MsFlags::MS_NOSUID))?;
    }
    for path in write {
        show(root, path, None)?;
    }
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | RESTRICTED;
    Ok(mount(none, root, none, flags, none)?)
}

/// Makes a directory the root of this process.
pub(crate) fn enter(root: &Path) -> rustix::io::Result<()> {
    chroot(root)?;
    chdir("/")
}

/// Returns the place of a path below the root directory.
fn place(root: &Path, path: &Path) -> io::Result<PathBuf> {
    let path = path.strip_prefix("/").map_err(io::Error::other)?;
    Ok(root.join(path))
}

/// Shows a file or a directory below the root directory. With flags, nothing in it can be written.
fn show(root: &Path, path: &Path, read_only: Option<MsFlags>) -> io::Result<()> {
    let none = None::<&str>;
    let named = |error: io::Error| io::Error::other(format!("{}: {error}", path.display()));
    let target = place(root, path).map_err(named)?;
    if fs::metadata(path).map_err(named)?.is_dir() {
        fs::create_dir_all(&target).map_err(named)?;
    } else if !target.exists() {
        let parent = target.parent().unwrap_or(root);
        fs::create_dir_all(parent).map_err(named)?;
        File::create(&target).map_err(named)?;
    }
    let shown = mount(Some(path), &target, none, MsFlags::MS_BIND, none);
    shown.map_err(|error| named(error.into()))?;
    if let Some(flags) = read_only {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | flags;
        let limited = mount(none, &target, none, flags, none);
        limited.map_err(|error| named(error.into()))?;
    }
    Ok(())
}
