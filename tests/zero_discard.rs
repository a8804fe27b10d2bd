//! Writing zeroes and discarding against a flat array, checked by QEMU where it is installed.

use std::path::{Path, PathBuf};
use std::process::Command;

use qcow2::image::{BackingFormat, BackingPolicy, CreateOptions, Image, OpenOptions, ZeroFlags, create};

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
    let open = OpenOptions { backing: BackingPolicy::Relative, ..Default::default() };
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
                let fill = vec![1 + rng.below(255) as u8; length as usize];
                image.pwrite(&fill, at).unwrap();
                expected[range].fill(fill[0]);
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

/// Space comes back: filled, discarded and flushed, the file occupies about what a new one does.
#[test]
fn a_discarded_image_occupies_what_an_empty_one_does() {
    use std::os::unix::fs::MetadataExt;
    let dir = scratch("zero-space");
    for (name, settings) in [("std", &[][..]), ("ext", &[("extended_l2", "on")][..])] {
        let path = dir.join(name);
        let mut options = CreateOptions::default();
        settings.iter().for_each(|(key, value)| options.set(key, value).unwrap());
        create(&path, 64 << 20, &options, false).unwrap();
        let occupied = || std::fs::metadata(&path).unwrap().blocks() * 512;
        let image = Image::open(&path, &OpenOptions::default()).unwrap();
        image.pwrite(&[1], 0).unwrap();
        image.discard(0, 64 << 20).unwrap();
        image.flush().unwrap();
        let empty = occupied();
        image.pwrite(&vec![7; 64 << 20], 0).unwrap();
        image.flush().unwrap();
        assert!(occupied() >= 64 << 20);
        image.discard(0, 64 << 20).unwrap();
        image.flush().unwrap();
        assert!(occupied() <= empty + empty / 20 + 65536, "{name}: {} bytes after, {empty} before", occupied());
        image.close().unwrap();
        qemu_check(&path);
    }
    let _ = std::fs::remove_dir_all(&dir);
}
