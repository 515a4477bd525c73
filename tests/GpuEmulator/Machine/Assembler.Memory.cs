using MiniCpmNative.GpuEmulator.Alu;
using MiniCpmNative.GpuEmulator.Memory;
using MiniCpmNative.GpuEmulator.Ptx;

namespace MiniCpmNative.GpuEmulator.Machine;

internal sealed unsafe partial class Assembler
{
    private bool BuildMemory(Instruction i, PtxInstruction p, Opcode op)
    {
        switch (op.Stem)
        {
            case "ld" or "ldu": return BuildAccess(i, p, op, load: true);
            case "st": return BuildAccess(i, p, op, load: false);
            case "atom" or "red": return BuildAtomic(i, p, op);
            case "cvta": return BuildWindow(i, p, op);
            case "mov": return BuildMove(i, p, op);
            case "prefetch" or "prefetchu":
                op.DropHints();
                op.Any("global", "local");
                op.Any("L1", "L2");
                if (op.Has("tensormap")) op.Any("param", "const");
                i.Run = &Moves.Nothing;
                return true;
            default: return false;
        }
    }

    private static Space TakeSpace(Opcode op) =>
        op.Any("global", "shared", "shared::cta", "shared::cluster", "const", "local", "param",
            "param::entry") switch
        {
            "global" => Space.Global,
            // A cluster is one block here.
            "shared" or "shared::cta" or "shared::cluster" => Space.Shared,
            "const" => Space.Const,
            "local" => Space.Local,
            "param" or "param::entry" => Space.Param,
            _ => Space.Generic,
        };

    private bool BuildAccess(Instruction i, PtxInstruction p, Opcode op, bool load)
    {
        string type = op.Last();
        string order = op.Any("volatile", "relaxed", "acquire", "release");
        (i.Volatile, i.Releases) = (order.Length > 0, order == "release");
        op.Has("weak");
        if (i.Volatile) op.Any("cta", "gpu", "sys", "cluster");
        op.Has("mmio");
        i.NonCoherent = op.Has("nc");
        i.Space = TakeSpace(op);
        op.DropHints();
        i.Count = op.Any("v2", "v4") switch { "v2" => 2, "v4" => 4, _ => 1 };
        i.Size = PtxParser.SizeOf(type);
        i.Signed = type[0] == 's';
        Operands(p, 2);
        var (value, address) = load ? (p.Operands[0], p.Operands[1])
            : (p.Operands[1], p.Operands[0]);
        var parts = value.Kind == OperandKind.Vector ? value.Elements : [value];
        if (parts.Length != i.Count)
            throw new PtxException($"expected {i.Count} registers, got {parts.Length}");
        if (parts.All(o => o.Kind == OperandKind.Sink))
            throw new PtxException("a load into nothing");
        i.DWidth = Math.Max(Width(type), parts.Max(o => o.Register?.Width ?? 4));
        i.Rows = [.. parts.Select(o => load ? Result(o, i.DWidth)
            : Row(o, i.DWidth, type[0] == 'f'))];
        TakeAddress(i, address, i.Space);
        if (i.Size * i.Count > 16) throw new PtxException("accesses above 16 bytes are not known");
        if (load && i.Volatile && i.Space is (Space.Global or Space.Generic))
            (i.Flow, i.Looks) = (Flow.Poll, true);
        i.Run = i.Space switch
        {
            Space.Global => load ? &GlobalAccess.Load : &GlobalAccess.Store,
            Space.Shared => load ? &OtherSpaces.LoadShared : &OtherSpaces.StoreShared,
            Space.Local => load ? &OtherSpaces.LoadLocal : &OtherSpaces.StoreLocal,
            Space.Const when load => &GlobalAccess.LoadConstant,
            Space.Param when load => &OtherSpaces.LoadParam,
            Space.Generic => load ? &OtherSpaces.LoadGeneric : &OtherSpaces.StoreGeneric,
            _ => throw new PtxException($"a store to {i.Space} memory"),
        };
        return true;
    }

    private int[] Vector(PtxOperand o, int width) => o.Kind == OperandKind.Vector
        ? [.. o.Elements.Select(e => e.Kind == OperandKind.Sink ? -1 : Row(e, width))]
        : [Row(o, width)];

    // [register + offset], [symbol + offset] or [offset].
    private void TakeAddress(Instruction i, PtxOperand o, Space space)
    {
        if (o.Kind != OperandKind.Address)
            throw new PtxException("expected an address in brackets");
        i.Offset = o.Offset;
        i.A = -1;
        if (o.Register != null)
        {
            i.AddressIs64 = o.Register.Width == 8;
            i.A = Row(o.Register);
            if (space is (Space.Global or Space.Generic or Space.Const) && !i.AddressIs64)
                throw new PtxException($"{o.Text} is too narrow for an address");
        }
        else if (o.Variable != null)
        {
            i.Offset += (long)AddressOf(o.Variable);
            if (space == Space.Generic) i.Offset += (long)Window(o.Variable.Space);
        }
        else if (o.Parameter != null)
            i.Offset += o.Parameter.Offset
                + (space == Space.Generic ? (long)DeviceMemory.ParamWindow : 0);
        else if (!char.IsAsciiDigit(o.Text[0])) throw new PtxException($"{o.Text} is not declared");
    }

    private static ulong Window(Space space) => space switch
    {
        Space.Shared => DeviceMemory.SharedWindow,
        Space.Local => DeviceMemory.LocalWindow,
        Space.Param => DeviceMemory.ParamWindow,
        _ => 0,
    };

    private bool BuildWindow(Instruction i, PtxInstruction p, Opcode op)
    {
        bool to = op.Has("to");
        var space = TakeSpace(op);
        string type = op.Last();
        if (type != "u64") throw op.Unknown(type);
        Operands(p, 2);
        i.D = Result(p.Operands[0], 8);
        i.A = Row(p.Operands[1], 8);
        i.B = Constant(Window(space), 8);
        i.Run = to ? &Maps.Binary<Sub<ulong>, ulong> : &Maps.Binary<Add<ulong>, ulong>;
        return true;
    }

    private bool BuildMove(Instruction i, PtxInstruction p, Opcode op)
    {
        string type = op.Last();
        Operands(p, 2);
        var (d, a) = (p.Operands[0], p.Operands[1]);
        if (type == "pred")
        {
            i.D = Predicate(d, out _);
            i.A = Predicate(a, out i.FlipA);
            i.Run = &Predicates.Logic;
            return true;
        }
        int bytes = PtxParser.SizeOf(type), width = Width(type);
        if (a.Kind == OperandKind.Vector)
        {
            i.D = Result(d, width);
            i.DWidth = width;
            i.Size = bytes / a.Elements.Length;
            i.Rows = [.. a.Elements.Select(e => Row(e, Math.Max(4, i.Size)))];
            i.Run = &Moves.Pack;
            return true;
        }
        if (d.Kind == OperandKind.Vector)
        {
            i.A = Row(a, width);
            i.AWidth = width;
            i.Size = bytes / d.Elements.Length;
            i.Rows = [.. d.Elements.Select(e => Result(e, Math.Max(4, i.Size)))];
            i.Run = &Moves.Unpack;
            return true;
        }
        i.D = Result(d, width);
        i.A = Row(a, width, type[0] == 'f');
        i.Run = width == 8 ? &Maps.Unary<Copy<ulong>, ulong> : &Maps.Unary<Copy<uint>, uint>;
        return true;
    }

    private bool BuildAtomic(Instruction i, PtxInstruction p, Opcode op)
    {
        bool returns = op.Stem == "atom";
        string type = op.Last();
        i.Releases = op.Any("relaxed", "acquire", "release", "acq_rel") is "release" or "acq_rel";
        op.Any("cta", "gpu", "sys", "cluster");
        i.Space = TakeSpace(op);
        op.DropHints();
        string name = op.Any("add", "exch", "cas", "min", "max", "inc", "dec", "and", "or", "xor");
        i.Mode = (int)(name switch
        {
            "add" => AtomicOp.Add,
            "exch" => AtomicOp.Exchange,
            "cas" => AtomicOp.CompareSwap,
            "min" => AtomicOp.Min,
            "max" => AtomicOp.Max,
            "inc" => AtomicOp.Increment,
            "dec" => AtomicOp.Decrement,
            "and" => AtomicOp.And,
            "or" => AtomicOp.Or,
            "xor" => AtomicOp.Xor,
            _ => throw new PtxException("the atomic's operation is not known"),
        });
        op.Has("noftz");
        int first = returns ? 1 : 0, width = Width(type);
        Operands(p, first + (name == "cas" ? 3 : 2));
        // Atomics are meant to meet other blocks' writes.
        i.Volatile = true;
        if (returns && i.Space is (Space.Global or Space.Generic))
            (i.Flow, i.Looks, i.DWidth) = (Flow.Poll, true, width);
        TakeAddress(i, p.Operands[first], i.Space);
        if (returns) i.D = Result(p.Operands[0], width);
        i.B = Row(p.Operands[first + 1], width, type[0] == 'f');
        if (name == "cas") i.C = Row(p.Operands[first + 2], width);
        i.Run = type switch
        {
            "u32" or "b32" => &Atomics.Run<uint>,
            "s32" => &Atomics.Run<int>,
            "u64" or "b64" => &Atomics.Run<ulong>,
            "s64" => &Atomics.Run<long>,
            "f32" when name == "add" => &Atomics.Run<float>,
            "f64" when name == "add" => &Atomics.Run<double>,
            _ => throw op.Unknown(type),
        };
        return true;
    }
}
