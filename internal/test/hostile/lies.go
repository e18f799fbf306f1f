package hostile

import "slices"

// lie makes one thing in the image untrue.
func (l *layout) lie() {
	lies := []func(){
		l.lieField, l.lieField, l.lieL2, l.lieL2, l.lieL2, l.lieL1, l.lieCount, l.free, l.free, l.lieBlock,
		l.cut, l.loop, l.packed, l.flip,
	}
	lies[l.choose(len(lies))]()
}

// somewhere returns an offset that something might be taken for.
func (l *layout) somewhere() uint64 {
	end := int64(len(l.b))
	var at int64
	switch l.choose(8) {
	case 0, 1, 2:
		at = pick(l.choose, l.tables)
	case 3:
		at = pick(l.choose, append(slices.Clone(l.data), l.refTable))
	case 4: // where the image grows
		at = end/l.cs*l.cs + int64(l.choose(6))*l.cs
	case 5:
		at = end - 1
	case 6:
		at = 1 << (30 + l.choose(26))
	default:
		at = 0
	}
	switch l.choose(8) {
	case 0:
		at++
	case 1:
		at += 512
	}
	return uint64(at)
}

// number returns a number that counts, sizes and flags may not survive.
func (l *layout) number() uint64 {
	switch l.choose(6) {
	case 0:
		return uint64(l.choose(4))
	case 1:
		return 1<<l.choose(64) - 1
	case 2:
		return 1 << l.choose(64)
	case 3:
		return -uint64(1 + l.choose(600))
	}
	return l.somewhere()
}

func (l *layout) lieField() {
	f := pick(l.choose, l.fields)
	v := l.number()
	l.set(f.at, f.size, v)
	l.say("%d bytes at %#x are %#x", f.size, f.at, v)
}

// set is put, where the image has not been cut off.
func (l *layout) set(at int64, size int, v uint64) {
	if at+int64(size) <= int64(len(l.b)) {
		l.put(at, size, v)
	}
}

// lieL2 makes L2 entries point to where no data is.
func (l *layout) lieL2() {
	for range 1 + l.choose(3) {
		at, to := pick(l.choose, l.l2Words), l.somewhere()
		l.set(at, 8, to&^511|copied*uint64(1-l.choose(4)/3)|uint64(l.choose(8)/7))
		if l.words == 2 {
			l.set(at+8, 8, 0xffffffff)
		}
		l.say("L2 entry at %#x points to %#x", at, to)
	}
}

func (l *layout) lieL1() {
	at, to := pick(l.choose, l.l1Words), l.somewhere()
	l.set(at, 8, to&^511|copied*uint64(l.choose(2)))
	l.say("L1 entry at %#x points to %#x", at, to)
}

// lieCount makes counts say that what is used is free.
func (l *layout) lieCount() {
	for range 1 + l.choose(3) {
		c := pick(l.choose, append(slices.Clone(l.tables), l.data...)) / l.cs
		n := uint64(l.choose(3))
		l.setCount(c, n)
		l.say("cluster %#x has refcount %d", c*l.cs, n)
	}
}

// free makes counts say that data is free: tables may come to lie there.
func (l *layout) free() {
	for range 2 + l.choose(6) {
		c := pick(l.choose, append(slices.Clone(l.data), l.l1)) / l.cs
		l.setCount(c, 0)
		l.say("cluster %#x is free", c*l.cs)
	}
}

func (l *layout) lieBlock() {
	at, to := pick(l.choose, l.refWords), l.somewhere()
	l.set(at, 8, to&^511)
	l.say("refcount table entry at %#x points to %#x", at, to)
}

// cut loses the end of the file.
func (l *layout) cut() {
	n := 1 + l.choose(len(l.b)/int(l.cs)+1)
	end := max(int64(len(l.b))-int64(n)*l.cs+int64(l.choose(2)*77), 512)
	if end < int64(len(l.b)) {
		l.b = l.b[:end]
		l.say("%d clusters are cut off", n)
	}
}

// loop makes all L1 entries point to one table.
func (l *layout) loop() {
	to := l.somewhere()
	for _, at := range l.l1Words {
		l.set(at, 8, to&^511|copied)
	}
	l.say("all L1 entries point to %#x", to)
}

// packed makes L2 entries compressed, of data that is something else.
func (l *layout) packed() {
	for range 1 + l.choose(4) {
		at, host := pick(l.choose, l.l2Words), int64(l.somewhere())&(1<<30-1)
		n := 1 + int64(l.choose(int(2*l.cs)))
		l.set(at, 8, l.compressed(host, n))
		l.say("L2 entry at %#x is compressed data at %#x, %d bytes", at, host, n)
	}
}

// flip changes a bit of a field.
func (l *layout) flip() {
	f, bit := pick(l.choose, l.fields), l.choose(64)
	if at := f.at + int64(bit/8%f.size); at < int64(len(l.b)) {
		l.b[at] ^= 1 << (bit % 8)
		l.say("bit %d of byte %#x is flipped", bit%8, at)
	}
}
