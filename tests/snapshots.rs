//! Internal snapshots: their table, and what is done with them, against QEMU.

mod judge;
mod qemu;

use std::path::Path;
use std::sync::Arc;

use judge::Judge;
use qcow2::format::{GuestOffset, Header};
use qcow2::image::{
    BackingPolicy, Image, OpenOptions, Preallocation, ResizeOptions, SnapshotFacts, WriteFlags, ZeroFlags,
};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::sim::{CrashBudget, DiskImage, Rng, Scheduler, SimDisk, SimIo};
use qcow2::storage::{Blocking, IoSrc, Storage};
use qcow2::tables::file::HostFile;
use qcow2::tables::snapshots::SnapshotTable;
use qcow2::wait::block_on;
use qcow2::{Error, Result};

fn load(bytes: Vec<u8>) -> Result<SnapshotTable> {
    let header = Header::parse(&bytes).unwrap();
    let file = HostFile::new(Arc::new(MemoryStorage::new(bytes)) as Arc<dyn Storage>);
    block_on(SnapshotTable::load(&Blocking, &file, header.snapshots_offset, header.snapshots))
}

#[test]
fn tables_that_qemu_wrote_are_read_and_written_byte_for_byte() {
    let Some(dir) = qemu::dir("snapshot-table") else { return };
    for options in ["compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=2M,extended_l2=on"] {
        let path = dir.path("table.qcow2");
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", options, &path, "3M"]);
        let names: Vec<String> = (0..17).map(|n| "name-\u{e9}".repeat(n * 2)).collect();
        for name in &names {
            qemu::img(&["snapshot", "-c", name, &path]);
        }
        qemu::img(&["snapshot", "-d", &names[3], &path]);
        let bytes = std::fs::read(&path).unwrap();
        let table = load(bytes.clone()).unwrap();
        assert_eq!(table.snapshots.len(), 16, "{options}");
        for (n, s) in (0..17usize).filter(|n| *n != 3).zip(&table.snapshots) {
            let name = &names[n].as_bytes()[..names[n].len().min(255)];
            assert_eq!((&s.id[..], &s.name[..]), ((n + 1).to_string().as_bytes(), name), "{options}");
            assert_eq!((s.disk_bytes(), s.vm_state_bytes(), s.icount()), (Some(3 << 20), 0, Some(0)), "{options}");
        }
        let stored = &bytes[table.offset.0 as usize..][..table.bytes as usize];
        assert_eq!(table.encode().unwrap(), stored, "{options}");
    }
}

#[test]
fn tables_that_lie_are_refused_by_name() {
    let Some(dir) = qemu::dir("snapshot-table-bad") else { return };
    let path = dir.path("table.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &path, "3M"]);
    for name in ["a", "b"] {
        qemu::img(&["snapshot", "-c", name, &path]);
    }
    let good = std::fs::read(&path).unwrap();
    let at = load(good.clone()).unwrap().offset.0 as usize;
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        load(bytes)
    };
    let field_of = |result: Result<SnapshotTable>| match result {
        Err(Error::SnapshotTable { entry, field, .. }) => (entry, field),
        other => panic!("{other:?}"),
    };
    let put = |bytes: &mut Vec<u8>, at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    assert_eq!(field_of(with(&|b| put(b, at + 36, 1025))), (0, "extra_data_size"));
    // One entry more than there are: zeroes follow, which make an empty entry, up to the end of the file.
    let extended = with(&|b| {
        put(b, 60, 3);
        b.resize(good.len() + 64, 0);
    });
    let geometry = Header::parse(&good).unwrap().geometry;
    assert!(extended.unwrap().snapshots[2].check_l1(2, geometry, 3 << 20, good.len() as u64).is_err());
    assert_eq!(field_of(with(&|b| put(b, 60, 65536))).1, "offset");
    // An entry whose name reaches past the end of the file.
    assert_eq!(field_of(with(&|b| b[at + 12..at + 16].fill(0xff))).1, "offset");
    assert_eq!(field_of(with(&|b| b.truncate(at + 39))), (0, "offset"));
    let half = with(&|b| b.truncate(at + 66)).map(|_| ());
    assert!(matches!(half, Err(Error::SnapshotTable { entry: 1, .. })), "{half:?}");
}

/// Contents of an image and of its snapshots, as QEMU sees them.
fn qemu_reads(path: &str, dir: &qemu::Dir, snapshot: Option<&str>) -> Vec<u8> {
    let raw = dir.path("seen.raw");
    let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
    let by_id = snapshot.map(|id| format!("snapshot.id={id}"));
    if let Some(by_id) = &by_id {
        args.extend(["-l", by_id]);
    }
    args.extend([path, &raw]);
    qemu::img(&args);
    std::fs::read(raw).unwrap()
}

struct Kept {
    id: String,
    name: String,
    content: Vec<u8>,
}

fn open_image(path: &str, options: &[(&str, &str)]) -> Image {
    let mut all = OpenOptions { backing: BackingPolicy::Any, ..OpenOptions::default() };
    options.iter().for_each(|(key, value)| all.set(key, value).unwrap());
    Image::open(Path::new(path), &all).unwrap()
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xaa; image.size() as usize];
    image.pread(&mut bytes, 0).unwrap();
    bytes
}

/// Everything reads as it should, by us and by QEMU, and nothing is leaked.
fn check_all(path: &str, dir: &qemu::Dir, content: &[u8], kept: &[Kept], label: &str) {
    qemu::check(path, false);
    assert!(qemu_reads(path, dir, None) == content, "{label}: QEMU reads something else");
    let bytes = DiskImage::new(std::fs::read(path).unwrap());
    let verdict = Judge::default().judge(&bytes);
    assert!(verdict.violations.is_empty() && verdict.leaks == 0, "{label}: {verdict:?}");
    let image = open_image(path, &[("read_only", "on")]);
    assert!(read_all(&image) == content, "{label}: the disk differs");
    let listed: Vec<(Vec<u8>, Vec<u8>)> = image.snapshots().unwrap().into_iter().map(|s| (s.id, s.name)).collect();
    let expected: Vec<_> = kept.iter().map(|k| (k.id.clone().into_bytes(), k.name.clone().into_bytes())).collect();
    assert_eq!(listed, expected, "{label}");
    for k in kept {
        assert!(qemu_reads(path, dir, Some(&k.id)) == k.content, "{label}: QEMU reads snapshot {} differently", k.id);
        let opened = image.snapshot_open(&k.id).unwrap();
        assert!(read_all(&opened) == k.content, "{label}: snapshot {} differs", k.id);
        let by_option = open_image(path, &[("snapshot", &k.id)]);
        assert!(read_all(&by_option) == k.content, "{label}: snapshot {} differs by option", k.id);
    }
}

fn random_bytes(rng: &mut Rng, length: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..length.div_ceil(8)).flat_map(|_| rng.next_u64().to_le_bytes()).collect();
    bytes.truncate(length as usize);
    bytes
}

/// An image that QEMU and we work on in turns, and what it has to read as.
struct Model<'a> {
    dir: &'a qemu::Dir,
    path: String,
    image: Option<Image>,
    cluster: u64,
    content: Vec<u8>,
    kept: Vec<Kept>,
    rng: Rng,
}

impl<'a> Model<'a> {
    fn new(dir: &'a qemu::Dir, options: &str, size: u64, with_backing: bool, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let (path, base) = (dir.path("model.qcow2"), dir.path("base.raw"));
        let mut content = vec![0; size as usize];
        let size_text = size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
        if with_backing {
            content = random_bytes(&mut rng, size);
            std::fs::write(&base, &content).unwrap();
            args.extend(["-b", &base, "-F", "raw"]);
        }
        args.extend([&path[..], &size_text]);
        qemu::img(&args);
        let cluster = Header::parse(&std::fs::read(&path).unwrap()).unwrap().geometry.cluster_size_bytes();
        Self { dir, path, image: None, cluster, content, kept: Vec::new(), rng }
    }

    /// Opens the image, perhaps with caches that hold next to nothing.
    fn image(&mut self) -> &Image {
        if self.image.is_none() {
            let tiny: &[(&str, &str)] = &[("l2_cache_size", "4k"), ("refcount_cache_size", "4k")];
            let options = if self.rng.one_in(2) { tiny } else { &[] };
            self.image = Some(open_image(&self.path, options));
        }
        self.image.as_ref().unwrap()
    }

    fn close(&mut self) {
        self.image().close().unwrap();
        self.image = None;
    }

    fn qemu_snapshot(&mut self, what: &str, name: &str) {
        self.close();
        qemu::img(&["snapshot", what, name, &self.path]);
    }

    fn check(&mut self, label: &str) {
        self.close();
        check_all(&self.path, self.dir, &self.content, &self.kept, label);
    }

    fn random_kept(&mut self) -> usize {
        self.rng.below(self.kept.len() as u64) as usize
    }

    /// One operation; those on snapshots by QEMU now and then.
    fn step(&mut self) -> Result<()> {
        let size = self.content.len() as u64;
        let at = self.rng.below(size);
        let most = [300, self.cluster, 5 * self.cluster][self.rng.below(3) as usize];
        let length = (1 + self.rng.below(most)).min(size - at);
        let (from, to) = (at / self.cluster * self.cluster, (at + length).next_multiple_of(self.cluster).min(size));
        let by_qemu = self.rng.one_in(4);
        match self.rng.below(20) {
            0..9 => {
                let data = random_bytes(&mut self.rng, length);
                self.image().pwrite(&data, at)?;
                self.content[at as usize..(at + length) as usize].copy_from_slice(&data);
            }
            9 => {
                let flags = ZeroFlags { may_unmap: self.rng.one_in(2), ..ZeroFlags::default() };
                self.image().write_zeroes(at, length, flags)?;
                self.content[at as usize..(at + length) as usize].fill(0);
            }
            10 if self.image().header().geometry.version > 2 => {
                self.image().discard(from, to - from)?;
                self.content[from as usize..to as usize].fill(0);
            }
            11 => self.image().flush()?,
            12 if from < to => {
                let data = vec![self.rng.below(256) as u8; (to - from) as usize];
                let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
                self.image().write(&[IoSrc::from(&data[..])], GuestOffset(from), flags)?;
                self.content[from as usize..to as usize].copy_from_slice(&data);
            }
            13 => self.close(),
            14..16 if self.kept.len() < 5 => {
                let name = format!("s{}", self.rng.below(4));
                match by_qemu {
                    true => self.qemu_snapshot("-c", &name),
                    false => drop(self.image().snapshot_create(&name, &SnapshotFacts::default())?),
                }
                let id = String::from_utf8(self.image().snapshots()?.pop().unwrap().id).unwrap();
                self.kept.push(Kept { id, name, content: self.content.clone() });
            }
            16 | 17 if !self.kept.is_empty() => {
                let index = self.random_kept();
                let id = self.kept[index].id.clone();
                match by_qemu {
                    true => self.qemu_snapshot("-a", &id),
                    false => self.image().snapshot_apply(&id)?,
                }
                self.content = self.kept[index].content.clone();
            }
            18 | 19 if !self.kept.is_empty() => {
                let index = self.random_kept();
                let gone = self.kept.remove(index);
                // QEMU deletes by name alone, and takes the first one.
                match by_qemu && self.kept.iter().all(|other| other.name != gone.name) {
                    true => self.qemu_snapshot("-d", &gone.name),
                    false => self.image().snapshot_delete(&gone.id, None)?,
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Random writes, zeroes, discards, snapshots and reopens.
fn run_model(mut model: Model, label: &str) {
    for op in 0..number("SNAPSHOT_OPS", 120) {
        let label = format!("{label}, op {op}");
        model.step().unwrap_or_else(|e| panic!("{label}: {e}"));
        if op % 30 == 29 {
            model.check(&label);
        }
        if model.rng.one_in(3) {
            let found = read_all(model.image());
            let wrong = found.iter().zip(&model.content).position(|(a, b)| a != b);
            assert_eq!(wrong, None, "{label}: the disk differs");
        }
    }
    while let Some(kept) = model.kept.pop() {
        model.image().snapshot_delete(&kept.id, None).unwrap();
    }
    model.check(&format!("{label}, all deleted"));
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

#[test]
fn we_and_qemu_take_turns_on_one_image() {
    let Some(dir) = qemu::dir("snapshot-model") else { return };
    let cases = [
        ("cluster_size=512", 300 << 10, false),
        ("cluster_size=512,refcount_bits=64", 300 << 10, true),
        ("cluster_size=4k", 1 << 20, true),
        ("cluster_size=4k,compat=0.10", 1 << 20, false),
        ("cluster_size=16k,extended_l2=on", 3 << 20, true),
        ("cluster_size=64k", (5 << 20) + 512, false),
        ("cluster_size=64k,extended_l2=on,refcount_bits=8", 5 << 20, true),
        ("cluster_size=2M,refcount_bits=64", 12 << 20, false),
    ];
    for (n, (options, size, with_backing)) in cases.into_iter().enumerate() {
        for round in 0..number("SNAPSHOT_ROUNDS", 1) {
            let seed = number("SNAPSHOT_SEED", 1) * 1000 + round * 100 + n as u64;
            run_model(Model::new(&dir, options, size, with_backing, seed), &format!("{options}, seed {seed}"));
        }
    }
}

fn open_simulated(disk: &Arc<SimDisk>) -> Image {
    Image::open_storage(disk.clone(), &OpenOptions::default()).unwrap()
}

/// The snapshot table of a file is changed in place, and becomes no longer than it has room for.
fn change_table(path: &str, change: impl FnOnce(&mut Vec<qcow2::format::Snapshot>)) {
    let mut bytes = std::fs::read(path).unwrap();
    let mut table = load(bytes.clone()).unwrap();
    change(&mut table.snapshots);
    let (at, new) = (table.offset.0 as usize, table.encode().unwrap());
    bytes.resize(bytes.len().max(at + new.len()), 0);
    bytes[at..at + new.len()].copy_from_slice(&new);
    std::fs::write(path, bytes).unwrap();
}

/// H4 of the known holes: QEMU wrote the active L1 table in place when a snapshot was applied, in pieces, and with COPIED flags that were no
/// longer right: after a crash two states were mixed, or a guest write landed in the snapshot. Here content and
/// size switch with one sector, and flags that are stale on disk are cleared before.
#[test]
fn h4_applying_a_snapshot_switches_content_and_size_at_once_and_trusts_no_flags() {
    let Some(dir) = qemu::dir("snapshot-apply") else { return };
    let path = dir.path("apply.qcow2");
    for (old, new) in [(100u64 << 10, 300u64 << 10), (300 << 10, 100 << 10)] {
        let (was, is) = (vec![1; old as usize], vec![2; new as usize]);
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", &path, &old.to_string()]);
        qemu::io(&path, &[&format!("write -q -P 1 0 {old}")]);
        qemu::img(&["snapshot", "-c", "s", &path]);
        qemu::img(&["resize", "-q", "--shrink", &path, &new.to_string()]);
        qemu::io(&path, &[&format!("write -q -P 2 0 {new}")]);
        let stale = with_stale_flags(std::fs::read(&path).unwrap());
        let disk = Arc::new(SimDisk::new(DiskImage::new(stale)));
        let io = SimIo::new(old, 1, vec![disk.clone()]);
        let mut scheduler = Scheduler::new(new);
        let image = open_simulated(&disk);
        let (mut seen, mut rng, mut judge) = (0, Rng::new(1), Judge::default());
        let mut counts = [0u64; 2];
        let applied = scheduler.run_one(image.snapshot_apply_with(&io, "s"), || {
            if std::mem::replace(&mut seen, disk.changes()) == disk.changes() {
                return;
            }
            disk.crash_states(&mut rng, CrashBudget { singles: 3, random: 3 }, |crashed| {
                let size = judge::Layout::parse(crashed).unwrap().trees[0].guest_size;
                let is_new = size == old;
                counts[usize::from(is_new)] += 1;
                if counts[usize::from(is_new)] % 20 != 1 {
                    return;
                }
                let verdict = judge.judge(crashed);
                assert!(verdict.violations.is_empty() || !is_new, "{verdict:?}");
                let again = open_simulated(&Arc::new(SimDisk::new(crashed.clone())));
                assert!(read_all(&again) == if is_new { was.clone() } else { is.clone() }, "size {size}");
                again.pwrite(&[3; 3000], 40_000).unwrap();
                again.flush().unwrap();
                assert!(read_all(&again.snapshot_open("s").unwrap()) == was, "a guest write landed in the snapshot");
            });
        });
        applied.unwrap().unwrap();
        assert!(counts.iter().all(|n| *n > 0), "both states were seen: {counts:?}");
        assert!(read_all(&image) == was);
        image.close().unwrap();
        let end = judge.judge(&disk.durable());
        assert!(end.violations.is_empty() && end.leaks == 0, "{end:?}");
    }
}

/// COPIED is set everywhere in the tables of the first snapshot, where it means nothing.
fn with_stale_flags(mut bytes: Vec<u8>) -> Vec<u8> {
    let snapshot = load(bytes.clone()).unwrap().snapshots.remove(0);
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    for index in 0..snapshot.l1_entries as usize {
        let l1_at = snapshot.l1_offset.0 as usize + index * 8;
        let l2_at = (word(&bytes, l1_at) & 0x00ff_ffff_ffff_fe00) as usize;
        for at in (l2_at..l2_at + 512).step_by(8).filter(|_| l2_at != 0) {
            bytes[at] |= if word(&bytes, at) == 0 { 0 } else { 0x80 };
        }
        bytes[l1_at] |= if l2_at == 0 { 0 } else { 0x80 };
    }
    bytes
}

#[test]
fn a_refcount_that_cannot_grow_is_refused_and_nothing_has_changed() {
    let Some(dir) = qemu::dir("snapshot-overflow") else { return };
    let path = dir.path("narrow.qcow2");
    for (bits, fit) in [(1u32, 0usize), (2, 2)] {
        let options = format!("refcount_bits={bits}");
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, &path, "1M"]);
        qemu::io(&path, &["write -q -P 5 0 200k"]);
        let image = open_image(&path, &[]);
        for _ in 0..fit {
            image.snapshot_create("s", &SnapshotFacts::default()).unwrap();
        }
        image.flush().unwrap();
        let before = std::fs::read(&path).unwrap();
        let refused = image.snapshot_create("s", &SnapshotFacts::default()).unwrap_err();
        assert!(
            matches!(refused, Error::TooLarge { .. }) && refused.to_string().contains("refcount_bits"),
            "{refused}"
        );
        assert!(std::fs::read(&path).unwrap() == before, "{bits} bits: the file has changed");
        image.pwrite(&[6; 100], 0).unwrap();
        image.close().unwrap();
        qemu::check(&path, false);
    }
}

/// Changes the size of the disk in the header, and nothing else.
fn change_size(path: &str, size: u64) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[24..32].copy_from_slice(&size.to_be_bytes());
    std::fs::write(path, bytes).unwrap();
}

/// An image with a snapshot that has VM state. It lies past the end of the disk: behind the second L2 table of a disk
/// that is 32 KiB. Returns the extra data of the snapshot.
fn make_with_vm_state(path: &str) -> Vec<u8> {
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "64k"]);
    qemu::io(path, &["write -q -P 1 0 32k", "write -q -P 2 32k 10k"]);
    qemu::img(&["snapshot", "-c", "vm", path]);
    let extra = [&[10u64 << 10, 32 << 10, 123].map(u64::to_be_bytes).concat()[..], b"of a later version"].concat();
    change_table(path, |snapshots| snapshots[0].extra = extra.clone());
    change_size(path, 32 << 10);
    qemu::check(path, false);
    extra
}

/// A larger disk has data where VM state lies. It reads as zeroes there, and the snapshot keeps its VM state.
#[test]
fn a_disk_grows_over_vm_state_and_the_snapshot_keeps_it() {
    let Some(dir) = qemu::dir("snapshot-vm-grows") else { return };
    let path = dir.path("vm.qcow2");
    make_with_vm_state(&path);
    let image = open_image(&path, &[]);
    for preallocation in [Preallocation::Off, Preallocation::Metadata, Preallocation::Full] {
        image.snapshot_apply("vm").unwrap();
        assert_eq!(image.size(), 32 << 10);
        image.resize(64 << 10, ResizeOptions { allow_shrink: false, preallocation }, None).unwrap();
        assert!(read_all(&image) == [vec![1; 32 << 10], vec![0; 32 << 10]].concat(), "{preallocation:?}");
        image.pwrite(&[7; 9000], 30 << 10).unwrap();
    }
    image.snapshot_apply("vm").unwrap();
    image.close().unwrap();
    qemu::check(&path, false);
    change_size(&path, 64 << 10);
    qemu::io(&path, &["read -q -P 1 0 32k", "read -q -P 2 32k 10k"]);
}

#[test]
fn vm_state_and_extra_data_of_others_stay_what_they_are() {
    let Some(dir) = qemu::dir("snapshot-vm-state") else { return };
    let path = dir.path("vm.qcow2");
    let extra = make_with_vm_state(&path);
    let image = open_image(&path, &[]);
    let listed = image.snapshots().unwrap().remove(0);
    assert_eq!((listed.vm_state_bytes(), listed.disk_bytes(), listed.icount()), (10 << 10, Some(32 << 10), Some(123)));
    image.pwrite(&[7; 5000], 1000).unwrap();
    image.snapshot_create("other", &SnapshotFacts::default()).unwrap();
    image.snapshot_apply("vm").unwrap();
    assert!(image.size() == 32 << 10 && read_all(&image) == vec![1; 32 << 10]);
    assert_eq!(image.header().l1_entries, listed.l1_entries, "the VM state is part of the active state as well");
    image.snapshot_delete("other", None).unwrap();
    assert_eq!(image.snapshots().unwrap()[0].extra, extra, "extra data is kept byte for byte");
    image.close().unwrap();
    qemu::check(&path, false);
    qemu::img(&["snapshot", "-a", "vm", &path]);
    let image = open_image(&path, &[]);
    assert_eq!(image.snapshots().unwrap()[0].extra, extra);
    image.snapshot_delete("vm", None).unwrap();
    image.close().unwrap();
    qemu::check(&path, false);
}

#[test]
fn a_broken_snapshot_is_named_and_the_disk_goes_on() {
    let Some(dir) = qemu::dir("snapshot-broken") else { return };
    let path = dir.path("broken.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &path, "1M"]);
    qemu::io(&path, &["write -q -P 1 0 200k"]);
    qemu::img(&["snapshot", "-c", "s", &path]);
    let good = std::fs::read(&path).unwrap();
    let active_l1 = Header::parse(&good).unwrap().l1_offset;
    for place in [0, 0x200, 1 << 40, active_l1.0] {
        std::fs::write(&path, &good).unwrap();
        change_table(&path, |snapshots| snapshots[0].l1_offset.0 = place);
        let image = open_image(&path, &[]);
        assert_eq!(image.snapshots().unwrap().len(), 1, "the list can still be read");
        let errors =
            [image.snapshot_apply("s"), image.snapshot_delete("s", None), image.snapshot_open("s").map(|_| ())];
        for error in errors {
            let named = matches!(error, Err(Error::SnapshotTable { entry: 0, field: "l1_table_offset", .. }));
            assert!(named, "0x{place:x}: {error:?}");
        }
        image.pwrite(&[9; 100], 0).unwrap();
        image.snapshot_create("another", &SnapshotFacts::default()).unwrap();
        image.close().unwrap();
    }
    // A table that cannot be read at all.
    let mut bytes = good.clone();
    let at = load(good).unwrap().offset.0 as usize;
    bytes[at + 36..at + 40].copy_from_slice(&u32::MAX.to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    let image = open_image(&path, &[]);
    assert!(matches!(image.snapshots(), Err(Error::SnapshotTable { field: "extra_data_size", .. })));
    assert!(image.snapshot_create("s", &SnapshotFacts::default()).is_err());
    assert!(image.info_with_lists().snapshot_list.is_empty());
    image.pwrite(&[9; 100], 0).unwrap();
    image.close().unwrap();
}

#[test]
fn a_disk_of_no_bytes_can_have_snapshots() {
    let Some(dir) = qemu::dir("snapshot-empty") else { return };
    let path = dir.path("empty.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &path, "0"]);
    let image = open_image(&path, &[]);
    image.snapshot_create("a", &SnapshotFacts::default()).unwrap();
    image.snapshot_create("b", &SnapshotFacts::default()).unwrap();
    image.snapshot_apply("a").unwrap();
    image.snapshot_delete("a", None).unwrap();
    image.close().unwrap();
    qemu::check(&path, false);
    qemu::img(&["snapshot", "-a", "b", &path]);
    qemu::check(&path, false);
}
