//! Compressed writes: against qemu-img in both directions, over whatever was there before, and with host clusters that
//! several compressed clusters share.

use crate::qemu;
use crate::stage;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use crate::judge::{Judge, Layout};
use crate::stage::{Start, cases, judge_disk, squeezable};
use qcow2::error::ErrorCode;
use qcow2::format::GuestOffset;
use qcow2::image::{BackingPolicy, CreateOptions, Image, MapKind, OpenOptions, WriteFlags, ZeroFlags};
use qcow2::storage::sim::{CrashBudget, DiskImage, Fault, Rng, Scheduler, SimDisk, SimIo, Task};
use qcow2::storage::{Blocking, IoDst, IoSrc, Storage};

const COMPRESSED: WriteFlags = WriteFlags { fua: false, compressed: true };

fn write_compressed(image: &Image, data: &[u8], offset: u64) {
    image.write(&[IoSrc::from(data)], GuestOffset(offset), COMPRESSED).unwrap();
}

fn open(path: &str) -> Image {
    let options = OpenOptions { backing: BackingPolicy::Any, ..OpenOptions::default() };
    Image::open(Path::new(path), &options).unwrap()
}

fn noise(rng: &mut Rng, length: u64) -> Vec<u8> {
    (0..length).map(|_| rng.next_u64() as u8).collect()
}

/// Clusters of text, half noise, noise and zeroes, in turn.
fn mixed(rng: &mut Rng, cluster: u64, length: u64) -> Vec<u8> {
    let mut data = Vec::new();
    for index in 0..length.div_ceil(cluster) {
        let mut bytes = noise(rng, cluster);
        match index % 5 {
            0 => bytes.iter_mut().enumerate().for_each(|(i, b)| *b = b"what is written "[i % 16] ^ (i / 999) as u8),
            1 => bytes[..cluster as usize / 2].fill(index as u8),
            2 => {}
            3 => bytes.fill(0),
            _ => bytes.iter_mut().for_each(|b| *b &= 0x1f),
        }
        data.extend(bytes);
    }
    data.truncate(length as usize);
    data
}

fn expect_content(image: &Image, content: &[u8], label: &str) {
    let mut found = vec![0xaa; content.len()];
    image.pread(&mut found, 0).unwrap();
    let wrong = found.iter().zip(content).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "{label}: first wrong byte");
}

/// The closed image is clean, and QEMU reads from it what was written.
fn expect_sound(dir: &qemu::Dir, path: &str, content: &[u8], label: &str) {
    let verdict = Judge::default().judge(&DiskImage::new(std::fs::read(path).unwrap()));
    assert!(verdict.violations.is_empty() && verdict.leaks == 0, "{label}: {verdict:?}");
    qemu::check(path, false);
    let raw = dir.path("expected.raw");
    std::fs::write(&raw, content).unwrap();
    let compared = qemu::img(&["compare", "-f", "qcow2", "-F", "raw", path, &raw]);
    assert!(compared.contains("identical"), "{label}: {compared}");
}

/// How many guest clusters are compressed.
fn count_compressed(path: &str) -> usize {
    let image = DiskImage::new(std::fs::read(path).unwrap());
    let layout = Layout::parse(&image).unwrap();
    let clusters = layout.trees[0].guest_size.div_ceil(layout.cluster());
    (0..clusters).filter(|&cluster| layout.entry(0, cluster).descriptor >> 62 == 1).count()
}

#[test]
fn qemu_reads_what_we_write_and_we_read_what_it_writes() {
    let Some(dir) = qemu::dir("compressed-both-ways") else { return };
    let shapes =
        (9..=21u64).flat_map(|bits| [(bits, false), (bits, true)]).filter(|&(bits, extended)| !extended || bits >= 14);
    for ((bits, extended), method) in shapes.flat_map(|shape| ["zlib", "zstd"].map(|method| (shape, method))) {
        let label = format!("clusters of 2^{bits}, extended {extended}, {method}");
        let mut rng = Rng::new(bits);
        let cluster = 1u64 << bits;
        let clusters = if bits < 14 { 300 } else { 10 };
        let size = (clusters * cluster + cluster / 2).next_multiple_of(512); // a short cluster at the end
        let content = mixed(&mut rng, cluster, size);
        let path = dir.path("image.qcow2");
        let options = format!(
            "cluster_size={cluster},compression_type={method},extended_l2={}",
            if extended { "on" } else { "off" }
        );
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, &path, &size.to_string()]);
        let image = open(&path);
        let cut = (clusters / 3) * cluster;
        write_compressed(&image, &content[..cut as usize], 0);
        expect_content(&image, &content[..cut as usize], &label);
        write_compressed(&image, &content[cut as usize..], cut);
        image.close().unwrap();
        expect_sound(&dir, &path, &content, &label);
        // Noise and zeroes are not compressed; all that is left of the disk is.
        let expected = (0..=clusters).filter(|index| ![2, 3].contains(&(index % 5))).count();
        assert_eq!(count_compressed(&path), expected, "{label}");
        expect_content(&open(&path), &content, &label);
        let theirs = dir.path("theirs.qcow2");
        qemu::img(&["convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", &options, &path, &theirs]);
        expect_content(&open(&theirs), &content, &label);
        // What another program has packed is overwritten like anything else.
        let image = open(&theirs);
        write_compressed(&image, &content[..cut as usize], 0);
        image.pwrite(&content[cut as usize + 1..cut as usize + 100], cut + 1).unwrap();
        image.close().unwrap();
        expect_sound(&dir, &theirs, &content, &label);
    }
}

#[test]
fn a_compressed_disk_is_about_as_small_as_qemu_makes_it() {
    let Some(dir) = qemu::dir("compressed-size") else { return };
    for method in ["zlib", "zstd"] {
        let mut rng = Rng::new(1);
        // Words, more and more of them with digits.
        let mut content = Vec::new();
        while content.len() < 8 << 20 {
            let word = 16 + rng.below(900) * rng.below(900);
            content.extend(format!("{:b} ", word * word).bytes());
            if rng.below(8 << 20) < content.len() as u64 {
                content.extend(noise(&mut rng, 4));
            }
        }
        let content = &content[..8 << 20];
        let (raw, ours, theirs) = (dir.path("disk.raw"), dir.path("ours.qcow2"), dir.path("theirs.qcow2"));
        std::fs::write(&raw, content).unwrap();
        let options = format!("compression_type={method}");
        qemu::img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, &raw, &theirs]);
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, &ours, &content.len().to_string()]);
        let image = open(&ours);
        write_compressed(&image, content, 0);
        image.close().unwrap();
        let length = |path: &str| std::fs::metadata(path).unwrap().len();
        let (ours, theirs) = (length(&ours), length(&theirs));
        println!("{method}: {} bytes become {ours}, with qemu-img {theirs}", content.len());
        assert!(ours * 100 <= theirs * 103, "{method}: {ours} bytes, and QEMU's file has {theirs}");
    }
}

/// Every state that a cluster can be in is replaced as a whole, and what others see of it stays.
#[test]
fn whatever_was_there_before_is_replaced() {
    let Some(dir) = qemu::dir("compressed-states") else { return };
    const CLUSTER: u64 = 64 << 10;
    for (options, backing) in
        [("extended_l2=on", true), ("extended_l2=on,compression_type=zstd", false), ("compat=0.10", true), ("", false)]
    {
        let v3 = !options.contains("0.10");
        let size = 12 * CLUSTER;
        let (base, path) = (dir.path("base.raw"), dir.path("image.qcow2"));
        std::fs::write(&base, vec![0xbb; size as usize]).unwrap();
        let size_text = size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        if backing {
            args.extend(["-b", &base, "-F", "raw"]);
        }
        args.extend([&path[..], &size_text]);
        qemu::img(&args);
        // 1: ours. 2: in part. 3: compressed. 4: zero, 5: zero with a host cluster. 6 to 9: the same in a snapshot.
        let at = |cluster: u64| cluster * CLUSTER;
        let mut commands = Vec::new();
        for first in [6, 1] {
            commands.push(format!("write -q -P 1 {} 64k", at(first)));
            commands.push(format!("write -q -P 2 {} 1000", at(first + 1) + 5000));
            commands.push(format!("write -q -c -P 3 {} 64k", at(first + 2)));
            commands.push(format!("write -q -z {} {} 64k", if v3 { "-u" } else { "" }, at(first + 3)));
            if first == 6 {
                qemu::io(&path, &commands.iter().map(|c| &c[..]).collect::<Vec<_>>());
                qemu::img(&["snapshot", "-c", "s", &path]);
                commands.clear();
            }
        }
        commands.push(format!("write -q -z {} 64k", at(5)));
        qemu::io(&path, &commands.iter().map(|c| &c[..]).collect::<Vec<_>>());
        let before = dir.path("before.raw");
        qemu::img(&["convert", "-l", "s", "-f", "qcow2", "-O", "raw", &path, &before]);
        let before = std::fs::read(&before).unwrap();

        let mut rng = Rng::new(7);
        for round in 0..3 {
            // Each kind of content meets each state.
            let mut content = vec![0; CLUSTER as usize * round];
            content.extend(mixed(&mut rng, CLUSTER, size));
            content.truncate(size as usize);
            let image = open(&path);
            write_compressed(&image, &content, 0);
            expect_content(&image, &content, options);
            image.close().unwrap();
            expect_sound(&dir, &path, &content, options);
            let after = dir.path("after.raw");
            qemu::img(&["convert", "-l", "s", "-f", "qcow2", "-O", "raw", &path, &after]);
            assert!(std::fs::read(&after).unwrap() == before, "{options}, round {round}: the snapshot has changed");
            // And back: parts of compressed clusters are written, zeroed and discarded.
            let image = open(&path);
            for cluster in 0..12 {
                let part = at(cluster) as usize + 3000..at(cluster) as usize + 9000;
                match (cluster + round as u64) % 4 {
                    0 => {
                        content[part.clone()].fill(0x77);
                        image.pwrite(&content[part.clone()], part.start as u64).unwrap();
                    }
                    1 => {
                        content[part.clone()].fill(0);
                        image.write_zeroes(part.start as u64, 6000, ZeroFlags::default()).unwrap();
                    }
                    2 if v3 => {
                        content[at(cluster) as usize..at(cluster + 1) as usize].fill(0);
                        image.discard(at(cluster), CLUSTER).unwrap();
                    }
                    _ => {}
                }
            }
            image.close().unwrap();
            expect_sound(&dir, &path, &content, options);
        }
        qemu::img(&["snapshot", "-d", "s", &path]);
        qemu::check(&path, false);
        std::fs::remove_file(&path).unwrap();
    }
}

/// A memory image and its storage.
fn memory(settings: &[(&str, &str)], size: u64) -> (Arc<qcow2::storage::memory::MemoryStorage>, Image) {
    let storage = Arc::new(qcow2::storage::memory::MemoryStorage::default());
    let mut options = CreateOptions::default();
    settings.iter().for_each(|(key, value)| options.set(key, value).unwrap());
    qcow2::wait::block_on(qcow2::image::create_with(&Blocking, &*storage, size, &options)).unwrap();
    let image = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
    (storage, image)
}

/// Of a file: most extents in one host cluster, and how many host clusters have any. Nothing is wrong with it but that
/// what was released last may still be counted.
fn packed(bytes: Vec<u8>) -> (u64, usize) {
    let image = DiskImage::new(bytes);
    let verdict = Judge::default().judge(&image);
    assert!(verdict.violations.is_empty(), "{verdict:?}");
    let layout = Layout::parse(&image).unwrap();
    let mut references: HashMap<u64, u64> = HashMap::new();
    for cluster in 0..layout.trees[0].guest_size.div_ceil(layout.cluster()) {
        let descriptor = layout.entry(0, cluster).descriptor;
        if descriptor >> 62 == 1 {
            let (offset, length) = layout.compressed_extent(descriptor);
            for host in offset / layout.cluster()..=(offset + length - 1) / layout.cluster() {
                *references.entry(host).or_default() += 1;
            }
        }
    }
    (references.values().copied().max().unwrap_or(0), references.len())
}

/// As many extents share a host cluster as its refcount can count, and no more.
#[test]
fn no_refcount_runs_over() {
    const CLUSTER: u64 = 4096;
    for bits in [1u64, 2, 4, 8, 16, 32, 64] {
        let (storage, image) = memory(&[("cluster_size", "4k"), ("refcount_bits", &bits.to_string())], 2000 * CLUSTER);
        // 20 bytes or so each.
        (0..1000u64).for_each(|n| write_compressed(&image, &[n as u8 | 1; CLUSTER as usize], n * CLUSTER));
        image.flush().unwrap();
        let (most, hosts) = packed(storage.snapshot());
        let limit = if bits < 8 { (1 << bits) - 1 } else { 255 };
        assert!(most <= limit && most + 80 >= limit, "{bits} bits: {most} extents in one cluster");
        assert!(hosts as u64 <= 1000 / most + 3, "{bits} bits: {hosts} host clusters, {most} extents in one");
        // Overwriting releases, one by one, and what is left stays readable.
        (0..1000).filter(|n| n % 3 != 0).for_each(|n| image.pwrite(&[7; 10], n * CLUSTER + 5).unwrap());
        image.flush().unwrap();
        packed(storage.snapshot());
        for n in 0..1000 {
            let mut found = [0; CLUSTER as usize];
            image.pread(&mut found, n * CLUSTER).unwrap();
            let mut expected = [n as u8 | 1; CLUSTER as usize];
            if n % 3 != 0 {
                expected[5..15].fill(7);
            }
            assert!(found == expected, "{bits} bits, cluster {n}");
        }
        image.close().unwrap();
        assert_eq!(Judge::default().judge(&DiskImage::new(storage.snapshot())).leaks, 0, "{bits} bits");
    }
}

/// Neighbours in one host cluster come and go, each by each way; the last one frees it.
#[test]
fn a_shared_host_cluster_is_free_once_nobody_is_in_it() {
    let (storage, image) = memory(&[("cluster_size", "4k")], 1 << 20);
    let data = |n: u64| squeezable(n + 1, n * 4096, 4096);
    let mut content = vec![0; 1 << 20];
    for round in 0..4 {
        for n in 0..40 {
            write_compressed(&image, &data(n), n * 4096);
            content[n as usize * 4096..][..4096].copy_from_slice(&data(n));
        }
        image.flush().unwrap();
        let (most, hosts) = packed(storage.snapshot());
        assert!(most > 2 && hosts < 30, "round {round}: {most} in one, {hosts} in all");
        for n in 0..40u64 {
            let at = n as usize * 4096;
            match (n + round) % 4 {
                0 => image.discard(n * 4096, 4096).unwrap(),
                1 => image.write_zeroes(n * 4096, 4096, ZeroFlags::default()).unwrap(),
                2 => image.pwrite(&[0; 4096], n * 4096).unwrap(),
                _ => write_compressed(&image, &[0; 4096], n * 4096),
            }
            content[at..at + 4096].fill(0);
            if n % 7 == 0 {
                image.flush().unwrap();
            }
            expect_content(&image, &content, &format!("round {round}, {n}"));
        }
        image.flush().unwrap();
        assert_eq!(packed(storage.snapshot()), (0, 0));
    }
    image.close().unwrap();
    assert_eq!(Judge::default().judge(&DiskImage::new(storage.snapshot())).leaks, 0);
    let length = storage.snapshot().len();
    assert!(length < 1 << 18, "the clusters were used again: {length} bytes");
}

/// A discard of the last cluster, which the image ends in, left compressed data alone: the subclusters past the end
/// were not covered, and compressed data cannot be given up in part.
#[test]
fn the_short_cluster_at_the_end_is_given_up_when_it_is_compressed() {
    for (settings, unmaps) in [(&[("extended_l2", "on")][..], false), (&[("extended_l2", "on")], true), (&[], false)] {
        let (storage, image) = memory(settings, (1 << 20) + 20480);
        write_compressed(&image, &[1; 65536 + 20480], (1 << 20) - 65536);
        // Not all that there is of it: a discard leaves it alone, zeroes become data.
        image.discard((1 << 20) + 4096, 16384).unwrap();
        assert_eq!(image.map(GuestOffset(1 << 20), 20480).unwrap().kind, MapKind::Compressed);
        match unmaps {
            true => {
                image.write_zeroes(1 << 20, 20480, ZeroFlags { no_fallback: true, ..ZeroFlags::default() }).unwrap()
            }
            false => image.discard(1 << 20, 20480).unwrap(),
        }
        assert_eq!(image.map(GuestOffset(1 << 20), 20480).unwrap().kind, MapKind::Zero);
        write_compressed(&image, &[1; 20480], 1 << 20);
        image.write_zeroes((1 << 20) + 4096, 16384, ZeroFlags::default()).unwrap();
        image.write_zeroes((1 << 20) + 18000, 2480, ZeroFlags::default()).unwrap();
        image.close().unwrap();
        let image = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
        let mut content = vec![0; (1 << 20) + 20480];
        content[(1 << 20) - 65536..(1 << 20) + 4096].fill(1);
        expect_content(&image, &content, "after zeroes");
        let verdict = Judge::default().judge(&DiskImage::new(storage.snapshot()));
        assert!(verdict.violations.is_empty() && verdict.leaks == 0, "{verdict:?}");
    }
}

#[test]
fn ranges_that_are_no_whole_clusters_are_refused_by_name() {
    let size = (1 << 20) + 1024;
    let (storage, image) = memory(&[], size);
    image.flush().unwrap();
    let before = storage.snapshot();
    let refused = |offset: u64, length: usize| {
        let data = vec![1; length];
        let error = image.write(&[IoSrc::from(&data[..])], GuestOffset(offset), COMPRESSED).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL);
        (error.code(), error.to_string())
    };
    for (offset, length, name) in
        [(1, 65536, "'offset' is 1"), (512, 0, "'offset'"), (0, 65535, "'length' is 65535"), (1 << 20, 999, "'length'")]
    {
        let (code, text) = refused(offset, length);
        assert!(code == ErrorCode::Argument && text.contains(name) && text.contains("65536 bytes"), "{text}");
    }
    assert_eq!(refused(1 << 20, 1025).0, ErrorCode::OutOfRange);
    assert!(storage.snapshot() == before, "refused, and yet the file has changed");
    write_compressed(&image, &[], 65536);
    write_compressed(&image, &[5; 1024], 1 << 20);
    assert_eq!(image.map(GuestOffset(1 << 20), 1024).unwrap().kind, MapKind::Compressed);
    image.close().unwrap();
}

/// Bytes in blocks of 64 KiB, of which only those take memory that were written.
#[derive(Default)]
struct Sparse {
    blocks: Mutex<HashMap<u64, Box<[u8]>>>,
    size: Mutex<u64>,
}

const BLOCK: u64 = 65536;

impl Storage for Sparse {
    fn read(&self, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        let (blocks, size, mut at) = (self.blocks.lock().unwrap(), *self.size.lock().unwrap(), offset);
        for piece in pieces {
            let mut done = 0;
            while done < piece.len() && at < size {
                let n = (BLOCK - at % BLOCK).min((piece.len() - done) as u64).min(size - at);
                let part = piece.slice(done, n as usize);
                match blocks.get(&(at / BLOCK)) {
                    Some(block) => part.copy_from(&block[(at % BLOCK) as usize..][..n as usize]),
                    None => part.fill_zero(),
                }
                (done, at) = (done + n as usize, at + n);
            }
        }
        Ok((at - offset) as usize)
    }

    fn write(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        let (mut blocks, mut at) = (self.blocks.lock().unwrap(), offset);
        for piece in pieces {
            let mut done = 0;
            while done < piece.len() {
                let n = (BLOCK - at % BLOCK).min((piece.len() - done) as u64);
                let block = blocks.entry(at / BLOCK).or_insert_with(|| vec![0; BLOCK as usize].into());
                piece.slice(done, n as usize).copy_to(&mut block[(at % BLOCK) as usize..][..n as usize]);
                (done, at) = (done + n as usize, at + n);
            }
        }
        let mut size = self.size.lock().unwrap();
        *size = at.max(*size);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(*self.size.lock().unwrap())
    }

    fn truncate(&self, size: u64) -> io::Result<()> {
        *self.size.lock().unwrap() = size;
        Ok(())
    }
}

/// With clusters of 2 MiB a compressed descriptor reaches 512 TiB. In a file that is full up to there, clusters are
/// stored as they are.
#[test]
fn past_the_reach_of_a_descriptor_nothing_is_compressed() {
    const CLUSTER: u64 = 2 << 20;
    let storage = Arc::new(Sparse::default());
    let mut options = CreateOptions::default();
    [("cluster_size", "2M"), ("refcount_bits", "1")].iter().for_each(|(key, value)| options.set(key, value).unwrap());
    qcow2::wait::block_on(qcow2::image::create_with(&Blocking, &*storage, 20 * CLUSTER, &options)).unwrap();
    // 16 refcount blocks, each for 2^24 clusters, are one and the same, and say that all of them are in use.
    let mut table = [0; 8];
    storage.read(&[IoDst::from(&mut table[..])], 48).unwrap();
    let full = 100 * CLUSTER;
    storage.write(&[IoSrc::from(&vec![0xff; CLUSTER as usize][..])], full).unwrap();
    for index in 0..16 {
        storage.write(&[IoSrc::from(&full.to_be_bytes()[..])], u64::from_be_bytes(table) + index * 8).unwrap();
    }
    let image = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
    let data = vec![0x11; 3 * CLUSTER as usize];
    write_compressed(&image, &data, CLUSTER);
    let extent = image.map(GuestOffset(CLUSTER), CLUSTER).unwrap();
    assert_eq!(extent.kind, MapKind::Data);
    assert!(extent.host_offset.unwrap().0 >= 1 << 49);
    image.flush().unwrap();
    image.close().unwrap();
    let image = Image::open_storage(storage, &OpenOptions::default()).unwrap();
    let mut found = vec![0; 5 * CLUSTER as usize];
    image.pread(&mut found, 0).unwrap();
    let edge = CLUSTER as usize;
    assert!(found[edge..4 * edge] == data && found[..edge].iter().chain(&found[4 * edge..]).all(|&b| b == 0));
}

fn start_of(name: &str, dir: &qemu::Dir) -> Start {
    cases().into_iter().find(|case| case.name == name).unwrap().make(dir)
}

/// R4 of the known holes: in QEMU, a read of a compressed cluster fails if a write to another part of that cluster
/// releases the compressed data meanwhile, and somebody else gets its place.
#[test]
fn r4_a_read_of_a_compressed_cluster_races_non_overlapping_writes_to_it() {
    let Some(dir) = qemu::dir("compressed-r4") else { return };
    let mut start = start_of("64 KiB", &dir);
    start.hot.truncate(4);
    let cluster = start.cluster;
    let (read, written) = ((1000, 3000), (cluster / 2, 4096));
    for seed in 1..1500 {
        let disk = Arc::new(SimDisk::new(start.image.clone()));
        let image = qcow2::wait::block_on(stage::open(&Blocking, &disk, &start, 0)).unwrap();
        let data = squeezable(1, 0, cluster);
        write_compressed(&image, &data, 0);
        image.flush().unwrap();
        let io = SimIo::new(seed, 3, vec![disk.clone()]);
        let reader = async {
            for _ in 0..3 {
                let mut found = vec![0; read.1];
                image
                    .read_with(&io, &[IoDst::from(&mut found[..])], GuestOffset(read.0))
                    .await
                    .unwrap_or_else(|why| panic!("seed {seed}: {why}"));
                assert!(found == data[read.0 as usize..][..read.1], "seed {seed}: the read saw foreign data");
            }
        };
        let writer = async {
            // The part, which releases the compressed data; the flush, which frees its place; and two who want it.
            let plain = WriteFlags::default();
            image.write_with(&io, &[IoSrc::from(&[7; 4096][..])], GuestOffset(written.0), plain).await.unwrap();
            image.flush_with(&io).await.unwrap();
            for n in 1..3 {
                let other = squeezable(n + 10, n * cluster, cluster);
                let flags = WriteFlags { fua: true, compressed: n == 2 };
                image.write_with(&io, &[IoSrc::from(&other[..])], GuestOffset(n * cluster), flags).await.unwrap();
            }
        };
        let tasks: Vec<Task<'_, ()>> = vec![Box::pin(reader), Box::pin(writer)];
        Scheduler::new(seed).run(tasks, || {}).unwrap();
        image.close().unwrap();
        let verdict = Judge::default().judge(&disk.durable());
        assert!(verdict.violations.is_empty() && verdict.leaks == 0, "seed {seed}: {verdict:?}");
    }
}

/// H1 of the known holes: in QEMU, overwriting a part of a compressed cluster frees its place at once; whoever gets it
/// writes there before the entry that let go of it is durable, and a kill leaves 64 KiB of stable data unreadable.
#[test]
fn h1_a_freed_cluster_is_not_reused_before_the_l2_write_that_unlinks_it_is_durable() {
    let Some(dir) = qemu::dir("compressed-h1") else { return };
    for name in ["64 KiB", "4 KiB", "16 KiB, extended"] {
        let start = start_of(name, &dir);
        let cluster = start.cluster;
        for seed in 1..6 {
            let disk = Arc::new(SimDisk::new(start.image.clone()));
            let io = SimIo::new(seed, 1, vec![disk.clone()]);
            let guest = RefCell::new(start.guest());
            let image = qcow2::wait::block_on(stage::open(&Blocking, &disk, &start, 0)).unwrap();
            let data = squeezable(1, 0, cluster);
            let ticket = guest.borrow_mut().issue(0, &data);
            write_compressed(&image, &data, 0);
            image.flush().unwrap();
            guest.borrow_mut().forced(&ticket);
            let (states, judge) = (Cell::new(0), RefCell::new(Judge::default()));
            let script = async {
                // A part of the stable cluster, and then others, plain and compressed, who would all fit into its place.
                let mut writes = vec![(cluster / 2, squeezable(2, cluster / 2, 512), false)];
                writes.extend((1..4).map(|n| (n * cluster, squeezable(n + 2, n * cluster, cluster), n % 2 == 0)));
                for (offset, data, compressed) in writes {
                    let ticket = guest.borrow_mut().issue(offset, &data);
                    let flags = WriteFlags { fua: false, compressed };
                    image.write_with(&io, &[IoSrc::from(&data[..])], GuestOffset(offset), flags).await.unwrap();
                    guest.borrow_mut().complete(&ticket);
                }
                let began = guest.borrow().now();
                image.flush_with(&io).await.unwrap();
                guest.borrow_mut().flushed(began);
            };
            let mut seen = 0;
            Scheduler::new(seed)
                .run_one(script, || {
                    if std::mem::replace(&mut seen, disk.changes()) == disk.changes() {
                        return;
                    }
                    let budget = CrashBudget::default();
                    states.set(
                        states.get()
                            + disk.crash_states(&mut Rng::new(seed), budget, |image| {
                                let wrong = judge_disk(&mut judge.borrow_mut(), image, &guest.borrow(), &start);
                                assert!(wrong.is_empty(), "{name}, seed {seed}: {wrong:#?}");
                            }),
                    );
                })
                .unwrap();
            assert!(states.get() > 50, "{} states", states.get());
            image.close().unwrap();
        }
    }
}

/// The host cluster that is being filled loses all that is in it, and becomes somebody else's: whether it is given back by
/// a flush, with or without a hole in its place, or by a write that failed.
#[test]
fn nobody_is_packed_into_a_cluster_that_is_somebody_elses_by_now() {
    let Some(dir) = qemu::dir("compressed-reuse") else { return };
    let start = start_of("4 KiB", &dir);
    for (unmap, fails) in [(false, false), (true, false), (false, true)] {
        let label = format!("unmap {unmap}, the write fails {fails}");
        let disk = Arc::new(SimDisk::new(start.image.clone()));
        let mut options = OpenOptions::default();
        options.set("discard", if unmap { "unmap" } else { "ignore" }).unwrap();
        let image = Image::open_storage(disk.clone(), &options).unwrap();
        let data = |n: u64| squeezable(n + 1, n * 4096, 4096);
        image.pwrite(&data(3), 3 * 4096).unwrap(); // so that the L2 table is there
        if fails {
            disk.set_fault(Some(Fault { index: disk.calls(), errno: libc::ENOSPC, sticky: false }));
            let failed = image.write(&[IoSrc::from(&data(0)[..])], GuestOffset(0), COMPRESSED);
            assert_eq!(failed.unwrap_err().errno(), libc::ENOSPC, "{label}");
            disk.set_fault(None);
        } else {
            write_compressed(&image, &data(0), 0);
            image.flush().unwrap();
            image.write_zeroes(0, 4096, ZeroFlags::default()).unwrap();
            image.flush().unwrap();
        }
        image.pwrite(&data(1), 4096).unwrap();
        write_compressed(&image, &data(2), 2 * 4096);
        expect_content(&image, &[vec![0; 4096], data(1), data(2), data(3)].concat(), &label);
        image.close().unwrap();
        let verdict = Judge::default().judge(&disk.durable());
        assert!(verdict.violations.is_empty() && verdict.leaks == 0, "{label}: {verdict:?}");
    }
}

/// Threads that fill one host cluster together.
#[test]
fn threads_pack_into_the_same_host_clusters() {
    for settings in [&[("cluster_size", "512")][..], &[("cluster_size", "4k"), ("refcount_bits", "4")]] {
        let (storage, image) = memory(settings, 8 << 20);
        let cluster = image.info().cluster_size_bytes;
        let data = |n: u64| squeezable(n + 1, n * cluster, cluster);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (image, data) = (&image, &data);
                scope.spawn(move || {
                    for n in 0..300u64 {
                        let at = n * 4 + thread;
                        write_compressed(image, &data(at), at * cluster);
                        match n % 11 {
                            3 => image.pwrite(&data(at)[7..100], at * cluster + 7).unwrap(),
                            5 => image.discard(at * cluster, cluster).unwrap(),
                            9 if thread == 0 => image.flush().unwrap(),
                            _ => {}
                        }
                    }
                });
            }
        });
        for n in 0..1200 {
            let mut found = vec![0; cluster as usize];
            image.pread(&mut found, n * cluster).unwrap();
            let expected = if n / 4 % 11 == 5 { vec![0; cluster as usize] } else { data(n) };
            assert!(found == expected, "cluster {n}");
        }
        image.close().unwrap();
        packed(storage.snapshot());
        assert_eq!(Judge::default().judge(&DiskImage::new(storage.snapshot())).leaks, 0);
    }
}
