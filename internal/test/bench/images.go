//go:build linux

package main

import (
	"cmp"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// images makes images as they are asked for, in a folder in memory and one on
// disk.
type images struct {
	memory, disk string
	size         int64
	made         map[string]string
	far          []*farAway
}

func newImages(size int64, disk string) (*images, error) {
	i := &images{size: size, made: map[string]string{}}
	var err error
	if i.disk, err = os.MkdirTemp(disk, "bench"); err != nil {
		return nil, err
	}
	if i.memory, err = os.MkdirTemp("/dev/shm", "bench"); err != nil {
		i.remove()
		return nil, err
	}
	return i, nil
}

func (i *images) remove() {
	for _, f := range i.far {
		f.close()
	}
	for _, dir := range []string{i.memory, i.disk} {
		if dir != "" {
			os.RemoveAll(dir)
		}
	}
}

// sizeOf returns the bytes of a disk.
func (i *images) sizeOf(k kind) int64 {
	return cmp.Or(k.size, i.size*max(k.times, 1))
}

// get returns the path of an image that a workload needs. What fits lies in the
// page cache.
func (i *images) get(w workload) (string, error) {
	if w.far() {
		return i.getFar(w)
	}
	dir := i.memory
	if w.place != memory {
		dir = i.disk
	}
	file := filepath.Join(dir, strings.ReplaceAll(w.kind.name, " ", "-"))
	if w.kind.fresh {
		os.Remove(file)
		return file, i.create(file, w.kind)
	}
	if i.made[file] != "" {
		return file, nil
	}
	switch {
	case w.kind.chain > 0:
		if err := i.chain(file, w.kind.chain); err != nil {
			return "", err
		}
	case w.kind.create != nil:
		if err := i.create(file, w.kind); err != nil {
			return "", err
		}
		i.made[file] = file
		return file, nil // it is all holes
	case w.kind.sparse:
		if err := i.scatter(file, i.sizeOf(w.kind)); err != nil {
			return "", err
		}
		i.made[file] = file
		return file, nil
	case w.kind.convert == nil:
		if err := i.fill(file, i.sizeOf(w.kind)); err != nil {
			return "", err
		}
	default:
		base, err := i.get(workload{kind: kind{name: fmt.Sprint("source ", w.kind.times), format: "raw", times: w.kind.times}})
		if err != nil {
			return "", err
		}
		args := append([]string{"convert", "-f", "raw"}, w.kind.convert...)
		if err := qemuImg(append(args, base, file)...); err != nil {
			return "", err
		}
	}
	i.made[file] = file
	return file, warm(file)
}

func (i *images) create(file string, k kind) error {
	args := append([]string{"create", "-q"}, k.create...)
	return qemuImg(append(args, file, fmt.Sprint(i.sizeOf(k)))...)
}

// scatter makes a raw image with a MiB of data in each 256.
func (i *images) scatter(file string, size int64) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	data := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{7}).Read(data)
	for at := int64(0); at < size; at += 256 << 20 {
		if _, err := f.WriteAt(data, at); err != nil {
			return err
		}
	}
	if err := f.Truncate(size); err != nil {
		return err
	}
	return f.Close()
}

// fill makes a raw image full of data of which each 64 KiB compress to about
// half.
func (i *images) fill(file string, size int64) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	rng := rand.NewChaCha8([32]byte{5})
	block := make([]byte, 64<<10)
	for n := int64(0); n < size; n += int64(len(block)) {
		rng.Read(block[:len(block)/2])
		text := fmt.Appendf(nil, "block at %d; ", n)
		for rest := block[len(block)/2:]; len(rest) > 0; {
			rest = rest[copy(rest, text):]
		}
		if _, err := f.Write(block); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return f.Close()
}

// chain makes a chain of n images, of which file is the last. Each cluster
// lies in one of them.
func (i *images) chain(file string, n int) error {
	const cluster = 64 << 10
	commands := make([]strings.Builder, n)
	rng := rand.New(rand.NewPCG(6, uint64(n)))
	for at := int64(0); at < i.size; at += cluster {
		fmt.Fprintf(&commands[rng.IntN(n)], "write -q -P %d %d %d\n", 1+rng.IntN(255), at, cluster)
	}
	for layer := range n {
		name, args := file, []string{"create", "-q", "-f", "qcow2"}
		if layer < n-1 {
			name = fmt.Sprint(file, "-", layer)
		}
		if layer > 0 {
			args = append(args, "-F", "qcow2", "-b", fmt.Sprint(file, "-", layer-1))
		}
		if err := qemuImg(append(args, name, fmt.Sprint(i.size))...); err != nil {
			return err
		}
		write := exec.Command("qemu-io", "-f", "qcow2", name)
		write.Stdin = strings.NewReader(commands[layer].String())
		if out, err := write.CombinedOutput(); err != nil {
			return fmt.Errorf("qemu-io: %w\n%s", err, out)
		}
	}
	return nil
}

func warm(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(io.Discard, f)
	return err
}

func qemuImg(args ...string) error {
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("qemu-img %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}
