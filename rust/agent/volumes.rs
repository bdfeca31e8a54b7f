// SPDX-License-Identifier: GPL-2.0-only

//! Guests learn the new size of a volume that was enlarged on any host.
//!
//! While disks have volumes, the registry is followed by a watch of etcd. When the size of a volume
//! changes, the process that serves it reads the size of the image and tells the guest.

use api::{socket, DiskCommand, DiskId, Record, RunDir};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io;
use std::thread;
use std::time::Duration;
use volume::etcd::Etcd;
use volume::record::ROOT;
use volume::{Config, Registry, VolumeInfo, VolumeName};

/// Time between two searches for disks with volumes, and before a failure is tried again.
const PERIOD: Duration = Duration::from_secs(5);

/// Time after which the registry is read again without a change.
const FOLLOW_TIME: Duration = Duration::from_secs(60);

/// Limit for a process to read the size of its image.
const TIMEOUT: Duration = Duration::from_secs(50);

/// The number of times that a process is told a size while its image does not have it. A client of
/// GlusterFS knows an earlier size for a second, and one of Ceph that only reads always.
const TRIES: u32 = 12;

/// The largest block of a disk, in bytes.
const MAX_BLOCK_SIZE: u64 = 4096;

/// The size that the process of a disk was told.
struct Told {
    uuid: String,
    size: u64,
    /// The number of times that it is told again.
    tries: u32,
}

/// The disks with volumes, and what their processes were told.
pub struct Volumes {
    run: RunDir,
    told: BTreeMap<DiskId, Told>,
}

impl Volumes {
    /// Names the directory with the records of the disks.
    pub fn new(run: RunDir) -> Self {
        Self {
            run,
            told: BTreeMap::new(),
        }
    }

    /// Starts a thread that follows the registry.
    pub fn start(mut self) -> io::Result<()> {
        let thread = thread::Builder::new().name("volumes".to_owned());
        thread.spawn(move || {
            let mut reported = String::new();
            loop {
                let failure = match self.follow() {
                    Ok(()) => String::new(),
                    Err(error) => error,
                };
                if !failure.is_empty() && failure != reported {
                    api::message!("volumes: {failure}; it is tried again");
                }
                reported = failure;
            }
        })?;
        Ok(())
    }

    /// Tells the processes the sizes, and waits for a change of the registry or some seconds.
    fn follow(&mut self) -> Result<(), String> {
        let told = self.tell_all();
        match &told {
            Ok(Some((registry, revision))) => {
                let store = registry.store();
                store.wait_for_change(ROOT, *revision, FOLLOW_TIME);
            }
            Ok(None) | Err(_) => thread::sleep(PERIOD),
        }
        told.map(|_| ())
    }

    /// Tells the processes of all disks with volumes the sizes of these. Returns the registry, and
    /// the revision before it was read; [`None`] if there is no such disk.
    fn tell_all(&mut self) -> Result<Option<(Registry<Etcd>, i64)>, String> {
        let disks = self.disks().map_err(|error| error.to_string())?;
        if disks.is_empty() {
            self.told.clear();
            return Ok(None);
        }
        let read = || {
            let registry = volume::connect(&Config::load()?);
            let revision = registry.store().revision()?;
            let volumes = registry.list(None)?;
            Ok((registry, revision, volumes))
        };
        let (registry, revision, volumes) =
            read().map_err(|error: volume::Error| error.to_string())?;
        self.tell(&disks, &volumes)?;
        Ok(Some((registry, revision)))
    }

    /// Returns the disks with volumes.
    fn disks(&self) -> io::Result<Vec<(DiskId, VolumeName)>> {
        let volume = |record: Record| {
            let name = VolumeName::of_image(&record.image)?.ok()?;
            Some((record.disk, name))
        };
        Ok(self.run.records()?.into_iter().filter_map(volume).collect())
    }

    /// Tells the processes of disks the sizes of their volumes, unless they were told. Returns an
    /// error of one of them, after all were told.
    fn tell(
        &mut self,
        disks: &[(DiskId, VolumeName)],
        volumes: &[VolumeInfo],
    ) -> Result<(), String> {
        self.told
            .retain(|disk, _| disks.iter().any(|(other, _)| other == disk));
        let known = volumes.iter().map(|info| (&info.name, &info.volume));
        let known: BTreeMap<_, _> = known.collect();
        let mut result = Ok(());
        for (disk, name) in disks {
            let Some(volume) = known.get(name) else {
                continue;
            };
            let told = self.told.get(disk);
            let told = told.filter(|told| (&told.uuid, told.size) == (&volume.uuid, volume.size));
            let tries = told.map_or(TRIES, |told| told.tries);
            if tries == 0 {
                continue;
            }
            let command = DiskCommand::Resize { size: None };
            let path = self.run.control_socket(*disk);
            match socket::command::<Value>(&path, command, TIMEOUT) {
                Ok(answer) => {
                    let has_size = has_size(&answer, volume.size);
                    if !has_size {
                        let text =
                            format!("{disk}: its image does not have the size of {name} yet");
                        result = Err(text);
                    }
                    let told = Told {
                        uuid: volume.uuid.clone(),
                        size: volume.size,
                        tries: if has_size { 0 } else { tries.saturating_sub(1) },
                    };
                    self.told.insert(*disk, told);
                }
                Err(failure) => result = Err(format!("{disk}: {}", failure.text.cause)),
            }
        }
        result
    }
}

/// Returns `true` if the disk of a process that has answered has a size in bytes. The rest behind
/// the last whole block does not count.
fn has_size(answer: &Value, size: u64) -> bool {
    let sectors = answer.get("sectors").and_then(Value::as_u64);
    let block_sectors = MAX_BLOCK_SIZE / 512;
    sectors.is_some_and(|sectors| sectors >= size / MAX_BLOCK_SIZE * block_sectors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::Phase;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc::{channel, Receiver};
    use volume::record::Volume;

    const DISK: DiskId = DiskId {
        domid: 5,
        devid: 51712,
    };

    /// Answers for the process of the disk, and returns what it is sent.
    fn answer(run: &RunDir) -> Receiver<String> {
        let listener = UnixListener::bind(run.control_socket(DISK)).unwrap();
        let (sender, lines) = channel();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                // The test looks for it as soon as it has the answer.
                sender.send(line).unwrap();
                writeln!(stream, "{{\"sectors\":8}}").unwrap();
            }
        });
        lines
    }

    fn write_record(run: &RunDir, image: &str) {
        run.write_record(&Record {
            disk: DISK,
            name: "xvda".to_owned(),
            domain: None,
            image: image.to_owned(),
            restarts: 0,
            replaced: None,
            phase: Phase::Starting,
        })
        .unwrap();
    }

    fn volumes(size: u64) -> Vec<VolumeInfo> {
        vec![VolumeInfo {
            name: "fast/db".parse().unwrap(),
            volume: Volume {
                uuid: "1".to_owned(),
                size,
                snapshots: Vec::new(),
                clone_of: None,
                pending: None,
            },
            writer: None,
            last_writer: None,
            readers: Vec::new(),
        }]
    }

    #[test]
    fn a_process_is_told_each_size_once() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let mut agent = Volumes::new(run.clone());
        write_record(&run, "raw:/a");
        assert!(agent.disks().unwrap().is_empty());
        write_record(&run, "vol:fast/db");
        let disks = agent.disks().unwrap();
        assert_eq!(disks, [(DISK, "fast/db".parse().unwrap())]);

        let error = agent.tell(&disks, &volumes(512)).unwrap_err();
        assert!(error.starts_with("5/51712: "), "{error}");
        let lines = answer(&run);
        for (size, is_told) in [(512, true), (512, false), (1024, true), (1024, false)] {
            agent.tell(&disks, &volumes(size)).unwrap();
            assert_eq!(lines.try_recv().is_ok(), is_told, "{size}");
        }
        agent.tell(&disks, &[]).unwrap();
        // A disk that was detached and attached again.
        agent.tell(&[], &volumes(1024)).unwrap();
        agent.tell(&disks, &volumes(1024)).unwrap();
        assert!(lines.try_recv().unwrap().contains("resize"));
    }

    #[test]
    fn a_process_whose_image_has_an_earlier_size_is_told_again() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        let mut agent = Volumes::new(run.clone());
        write_record(&run, "vol:fast/db");
        let disks = agent.disks().unwrap();
        // It answers with 8 sectors.
        let lines = answer(&run);
        for _ in 0..TRIES {
            let error = agent.tell(&disks, &volumes(8192)).unwrap_err();
            assert!(
                error.contains("does not have the size of fast/db"),
                "{error}"
            );
            assert!(lines.try_recv().is_ok());
        }
        for (size, is_told) in [(8192, false), (4096, true), (4096, false)] {
            agent.tell(&disks, &volumes(size)).unwrap();
            assert_eq!(lines.try_recv().is_ok(), is_told, "{size}");
        }
    }

    #[test]
    fn a_host_without_volumes_needs_no_etcd() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path());
        write_record(&run, "raw:/a");
        assert!(Volumes::new(run).tell_all().unwrap().is_none());
    }
}
