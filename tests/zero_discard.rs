//! Writing zeroes and discarding against a flat array, checked by QEMU where it is installed.

use std::path::{Path, PathBuf};
use std::process::Command;

use qcow2::format::GuestOffset;
use qcow2::image::options::DetectZeroes;
use qcow2::image::{
    BackingFormat, BackingPolicy, CreateOptions, Image, MapKind, OpenOptions, WriteFlags, ZeroFlags, create,
};
use qcow2::storage::IoSrc;

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

fn scratch(name: &str) -> PathBuf {
    let base = if Path::new("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
    let dir = base.join(format!("libqcow2-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn qemu_check(path: &Path) {
    match Command::new("qemu-img").args(["check", "-q"]).arg(path).output() {
        Ok(out) => assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout)),
        Err(_) => {
            assert!(std::env::var_os("CI").is_none(), "qemu-img is needed in CI");
            eprintln!("SKIPPED: qemu-img is not installed");
        }
    }
}

/// One geometry: random writes, zeroes and discards; after each the whole disk reads as the array says.
fn run(name: &str, settings: &[(&str, &str)], backing_bytes: Option<u64>, seed: u64) {
    let dir = scratch(&format!("zero-{name}"));
    let path = dir.join("image.qcow2");
    let size = 700 * 512 + 1024 * 1024u64;
    let mut rng = Rng(seed);
    let mut expected = vec![0u8; size as usize];
    let mut options = CreateOptions::default();
    for (key, value) in settings {
        options.set(key, value).unwrap();
    }
    if let Some(bytes) = backing_bytes {
        let base: Vec<u8> = (0..bytes).map(|i| 0x80 | (i / 512) as u8).collect();
        std::fs::write(dir.join("base.raw"), &base).unwrap();
        let n = bytes.min(size) as usize;
        expected[..n].copy_from_slice(&base[..n]);
        options.backing_file = Some("base.raw".into());
        options.backing_fmt = Some(BackingFormat::Raw);
    }
    create(&path, size, &options, false).unwrap();
    let detect_zeroes = [DetectZeroes::Off, DetectZeroes::On, DetectZeroes::Unmap][seed as usize % 3];
    let open = OpenOptions { backing: BackingPolicy::Relative, detect_zeroes, ..Default::default() };
    let mut image = Image::open(&path, &open).unwrap();
    let mut seen = vec![0; size as usize];
    for step in 0..200 {
        let at = rng.below(size);
        let unit = [1, 512, 2048, 4096, 65536][rng.below(5) as usize];
        let at = at / unit * unit;
        let length = (1 + rng.below(150_000) / unit * unit).max(unit).min(size - at);
        let range = at as usize..(at + length) as usize;
        match rng.below(8) {
            0..=2 => {
                let mut data = vec![1 + rng.below(255) as u8; length as usize];
                // Stretches of zeroes, which options may turn into entries.
                for _ in 0..rng.below(4) {
                    let from = rng.below(length) as usize;
                    let to = from + rng.below(length - from as u64 + 1) as usize;
                    data[from..to].fill(0);
                }
                image.pwrite(&data, at).unwrap();
                expected[range].copy_from_slice(&data);
            }
            3..=5 => {
                let flags = ZeroFlags { may_unmap: rng.below(2) == 0, ..Default::default() };
                image.write_zeroes(at, length, flags).unwrap();
                expected[range].fill(0);
            }
            6 => {
                image.discard(at, length).unwrap();
                // Advice: each byte is what it was, or zero; below a subcluster it is what it was.
                image.pread(&mut seen[range.clone()], at).unwrap();
                for i in range {
                    assert!(seen[i] == expected[i] || seen[i] == 0, "step {step}: byte {i} is neither old nor zero");
                    expected[i] = seen[i];
                }
            }
            _ => {
                image.flush().unwrap();
                if rng.below(3) == 0 {
                    image.close().unwrap();
                    image = Image::open(&path, &open).unwrap();
                }
            }
        }
        image.pread(&mut seen, 0).unwrap();
        if seen != expected {
            let i = seen.iter().zip(&expected).position(|(a, b)| a != b).unwrap();
            panic!("{name} seed {seed} step {step}: byte {i} is {} instead of {}", seen[i], expected[i]);
        }
    }
    image.close().unwrap();
    drop(image);
    qemu_check(&path);
    let _ = std::fs::remove_dir_all(&dir);
}

#[test]
fn zeroes_and_discards_leave_what_a_flat_disk_would_hold() {
    for seed in 0..3 {
        run("ext", &[("extended_l2", "on")], None, seed);
        run("ext-backed", &[("extended_l2", "on")], Some(2 << 20), seed);
        run("ext-short", &[("extended_l2", "on"), ("cluster_size", "16k")], Some(333_333), seed);
        run("std", &[], None, seed);
        run("std-backed", &[("cluster_size", "4k")], Some(2 << 20), seed);
        run("std-512", &[("cluster_size", "512"), ("refcount_bits", "64")], Some(100_000), seed);
        run("v2", &[("compat", "v2")], None, seed);
        run("v2-backed", &[("compat", "v2")], Some(500_000), seed);
    }
}

#[test]
fn no_fallback_fails_rather_than_write_data() {
    let dir = scratch("zero-no-fallback");
    let path = dir.join("image.qcow2");
    create(&path, 1 << 20, &CreateOptions::default(), false).unwrap();
    let image = Image::open(&path, &OpenOptions::default()).unwrap();
    image.pwrite(&[7; 4096], 0).unwrap();
    let flags = ZeroFlags { no_fallback: true, ..Default::default() };
    assert_eq!(image.write_zeroes(100, 1000, flags), Err(qcow2::Error::NoFallback));
    let mut seen = [0; 4096];
    image.pread(&mut seen, 0).unwrap();
    assert_eq!(seen, [7; 4096]);
    image.write_zeroes(0, 1 << 20, flags).unwrap();
    image.pread(&mut seen, 0).unwrap();
    assert_eq!(seen, [0; 4096]);
    drop(image);
    let _ = std::fs::remove_dir_all(&dir);
}

/// Zeroes that are written take no space when they are detected: what QEMU's map says of the same writes.
#[test]
fn detected_zeroes_are_entries() {
    let dir = scratch("zero-detect");
    for (name, settings, unit) in [("std", &[][..], 65536), ("ext", &[("extended_l2", "on")][..], 2048)] {
        let path = dir.join(name);
        let mut options = CreateOptions::default();
        settings.iter().for_each(|(key, value)| options.set(key, value).unwrap());
        create(&path, 8 << 20, &options, false).unwrap();
        let kinds = |detect_zeroes, data: &[u8], at: u64| {
            let image = Image::open(&path, &OpenOptions { detect_zeroes, ..Default::default() }).unwrap();
            image.pwrite(data, at).unwrap();
            let mut kinds = Vec::new();
            let mut from = at;
            while from < at + data.len() as u64 {
                let extent = image.map(GuestOffset(from), at + data.len() as u64 - from).unwrap();
                kinds.push((extent.kind, extent.host_offset.is_some(), extent.length));
                from += extent.length;
            }
            image.close().unwrap();
            qemu_check(&path);
            kinds
        };
        // Before anything was allocated there: no host cluster. Parts of a unit count where the rest reads as zeroes.
        assert!(kinds(DetectZeroes::On, &vec![0; 100_000], 333).iter().all(|k| (k.0, k.1) == (MapKind::Zero, false)));
        let mut data = vec![5; 3 * unit];
        data[unit..2 * unit].fill(0);
        let at = 1 << 20;
        let plain = kinds(DetectZeroes::Off, &data, at);
        assert!(plain.iter().all(|k| k.0 == MapKind::Data), "{plain:?}");
        let (u, data_kind) = (unit as u64, (MapKind::Data, true));
        let found = kinds(DetectZeroes::On, &data, at);
        assert_eq!(found, [(data_kind.0, true, u), (MapKind::Zero, true, u), (data_kind.0, true, u)], "{name}");
        // The host cluster goes only where nothing of it is needed, and only if it may.
        let zeroes = vec![0; 65536];
        assert_eq!(kinds(DetectZeroes::On, &zeroes, at), [(MapKind::Zero, true, 65536)], "{name}");
        assert_eq!(kinds(DetectZeroes::Unmap, &zeroes, at), [(MapKind::Zero, false, 65536)], "{name}");
        let mut almost = vec![0; unit];
        almost[unit - 1] = 1;
        assert_eq!(kinds(DetectZeroes::Unmap, &almost, at), [(MapKind::Data, true, u)], "{name}");
    }
    let options = OpenOptions {
        detect_zeroes: DetectZeroes::Unmap,
        discard: qcow2::image::options::Discard::Ignore,
        ..Default::default()
    };
    let e = Image::open(&dir.join("std"), &options).err().unwrap();
    assert!(matches!(&e, qcow2::Error::OptionValue { key, .. } if key == "detect_zeroes"), "{e}");
    let _ = std::fs::remove_dir_all(&dir);
}

/// Guest memory that changes while it is written: each byte becomes one of its values, whatever was detected.
#[test]
fn memory_that_changes_under_a_detecting_write_leaves_one_of_its_values() {
    use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
    let dir = scratch("zero-race");
    let path = dir.join("image.qcow2");
    let options = CreateOptions { extended_l2: true, ..Default::default() };
    create(&path, 8 << 20, &options, false).unwrap();
    let open = OpenOptions { detect_zeroes: DetectZeroes::On, ..Default::default() };
    let image = Image::open(&path, &open).unwrap();
    let memory: Vec<AtomicU8> = (0..64 << 10).map(|_| AtomicU8::new(0)).collect();
    let stop = AtomicBool::new(false);
    let mut kinds = [0u32; 2];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for value in [9, 0] {
                    memory.iter().for_each(|byte| byte.store(value, Ordering::Relaxed));
                }
            }
        });
        for _ in 0..300 {
            // SAFETY: valid for the whole test; bytes change meanwhile, which pieces are made for.
            let piece = unsafe { IoSrc::from_raw(memory.as_ptr().cast::<u8>().cast_mut(), memory.len()) };
            image.write(&[piece], GuestOffset(100), WriteFlags::default()).unwrap();
            let mut seen = vec![1; memory.len()];
            image.pread(&mut seen, 100).unwrap();
            for byte in seen {
                assert!(byte == 0 || byte == 9);
                kinds[usize::from(byte == 9)] += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(kinds[0] > 0 && kinds[1] > 0, "the memory never changed: {kinds:?}");
    image.close().unwrap();
    qemu_check(&path);
    let _ = std::fs::remove_dir_all(&dir);
}

/// Space comes back: filled, discarded at once or in pieces, and flushed, the file occupies what a new one does. (L2
/// tables in which nothing was left were kept at first, which is a third more than a new image with 64 KiB clusters.)
#[test]
fn a_discarded_image_occupies_what_an_empty_one_does() {
    use std::os::unix::fs::MetadataExt;
    let dir = scratch("zero-space");
    const SIZE: u64 = 64 << 20;
    for (name, settings, at_once) in [
        ("std", &[][..], SIZE),
        ("ext", &[("extended_l2", "on")][..], SIZE),
        ("pieces", &[][..], 1 << 20),
        ("ext-pieces", &[("extended_l2", "on"), ("cluster_size", "131072")][..], 3 << 17),
        ("v2-pieces", &[("compat", "0.10")][..], 65536),
    ] {
        let path = dir.join(name);
        let mut options = CreateOptions::default();
        settings.iter().for_each(|(key, value)| options.set(key, value).unwrap());
        create(&path, SIZE, &options, false).unwrap();
        let occupied = || std::fs::metadata(&path).unwrap().blocks() * 512;
        let empty = occupied();
        let image = Image::open(&path, &OpenOptions::default()).unwrap();
        for round in 0..2 {
            image.pwrite(&vec![7; SIZE as usize], 0).unwrap();
            image.flush().unwrap();
            assert!(occupied() >= SIZE);
            for at in (0..SIZE).step_by(at_once as usize) {
                image.discard(at, at_once.min(SIZE - at)).unwrap();
            }
            image.flush().unwrap();
            let now = occupied();
            assert!(now <= empty + empty / 20, "{name}, round {round}: {now} bytes, {empty} when it was new");
        }
        let mut sample = [1; 4096];
        image.pread(&mut sample, 5 << 20).unwrap();
        assert_eq!(sample, [0; 4096]);
        image.close().unwrap();
        qemu_check(&path);
    }
    let _ = std::fs::remove_dir_all(&dir);
}

/// Zeroing or discarding what an L2 table maps as a whole looks at no entry that does not exist: an empty disk stays one.
#[test]
fn zeroes_on_a_disk_that_is_zero_allocate_nothing() {
    let dir = scratch("zero-empty");
    let path = dir.join("image");
    create(&path, 1 << 40, &CreateOptions::default(), false).unwrap();
    let before = std::fs::read(&path).unwrap();
    let image = Image::open(&path, &OpenOptions::default()).unwrap();
    image.write_zeroes(0, 1 << 40, ZeroFlags::default()).unwrap();
    image.discard(0, 1 << 40).unwrap();
    image.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before, "something was written");
    // One table is there, and kept where its clusters may not be let go.
    let image = Image::open(&path, &OpenOptions::default()).unwrap();
    image.pwrite(&[5; 65536], 600 << 20).unwrap();
    image.write_zeroes(0, 1 << 40, ZeroFlags::default()).unwrap();
    assert_eq!((image.stats().l2_tables_allocated, image.stats().clusters_allocated), (1, 1));
    let mut sample = [1; 65536];
    image.pread(&mut sample, 600 << 20).unwrap();
    assert!(sample == [0; 65536]);
    image.write_zeroes(0, 1 << 40, ZeroFlags { may_unmap: true, ..ZeroFlags::default() }).unwrap();
    image.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before, "space is still held");
    qemu_check(&path);
    let _ = std::fs::remove_dir_all(&dir);
}
