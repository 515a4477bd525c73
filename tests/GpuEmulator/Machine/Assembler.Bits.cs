using System.Runtime.Intrinsics.X86;
using MiniCpmNative.GpuEmulator.Alu;
using MiniCpmNative.GpuEmulator.Ptx;

namespace MiniCpmNative.GpuEmulator.Machine;

internal sealed unsafe partial class Assembler
{
    private bool BuildBits(Instruction i, PtxInstruction p, Opcode op)
    {
        switch (op.Stem)
        {
            case "and" or "or" or "xor" or "not": return BuildLogic(i, p, op);
            case "shl" or "shr": return BuildShift(i, p, op);
            case "popc" or "clz" or "brev" or "bfind": return BuildScan(i, p, op);
            case "bfe": return BuildExtract(i, p, op);
            case "bfi":
                string type = op.Last();
                int width = Width(type);
                Operands(p, 5);
                i.DWidth = width;
                i.D = Result(p.Operands[0], width);
                i.A = Row(p.Operands[1], width);
                i.B = Row(p.Operands[2], width);
                i.C = Row(p.Operands[3], 4);
                i.E = Row(p.Operands[4], 4);
                i.Run = &Moves.Insert;
                return true;
            case "prmt" or "lop3" or "shf": return BuildTable(i, p, op);
            case "sad":
                string sad = op.Last();
                Take(i, p, 3, 4, 4, false);
                i.Run = sad switch
                {
                    "s32" => &Maps.Scalar3<Sad<int, long>, int, int, int, int>,
                    "u32" => &Maps.Scalar3<Sad<uint, long>, uint, uint, uint, uint>,
                    _ => throw op.Unknown(sad),
                };
                return true;
            default: return false;
        }
    }

    private bool BuildLogic(Instruction i, PtxInstruction p, Opcode op)
    {
        string type = op.Last();
        if (type == "pred")
        {
            Operands(p, op.Stem == "not" ? 2 : 3);
            i.D = Predicate(p.Operands[0], out _);
            i.A = Predicate(p.Operands[1], out i.FlipA);
            if (op.Stem == "not") i.FlipA = ~i.FlipA;
            else i.B = Predicate(p.Operands[2], out i.FlipB);
            i.Mode = op.Stem switch
            {
                "and" => Predicates.And,
                "or" => Predicates.Or,
                "xor" => Predicates.Xor,
                _ => Predicates.None,
            };
            i.Run = &Predicates.Logic;
            return true;
        }
        bool wide = Width(type) == 8;
        if (type is not ("b16" or "b32" or "b64")) throw op.Unknown(type);
        Take(i, p, op.Stem == "not" ? 1 : 2, Width(type), Width(type), false);
        i.Run = op.Stem switch
        {
            "and" => wide ? &Maps.Binary<And<ulong>, ulong> : &Maps.Binary<And<uint>, uint>,
            "or" => wide ? &Maps.Binary<Or<ulong>, ulong> : &Maps.Binary<Or<uint>, uint>,
            "xor" => wide ? &Maps.Binary<Xor<ulong>, ulong> : &Maps.Binary<Xor<uint>, uint>,
            _ => wide ? &Maps.Unary<Not<ulong>, ulong> : &Maps.Unary<Not<uint>, uint>,
        };
        return true;
    }

    private bool BuildShift(Instruction i, PtxInstruction p, Opcode op)
    {
        string type = op.Last();
        Operands(p, 3);
        i.D = Result(p.Operands[0], Width(type));
        i.A = Row(p.Operands[1], Width(type));
        i.B = Row(p.Operands[2], 4);
        i.Mode = op.Stem == "shl" ? 0 : 1;
        i.Run = (op.Stem, type) switch
        {
            ("shl", "b32") => &Maps.Binary<Shl32, uint>,
            ("shl", "b64") when Avx2.IsSupported => &Moves.Shift64,
            ("shr", "u64" or "b64") when Avx2.IsSupported => &Moves.Shift64,
            ("shl", "b64") => &Maps.Scalar2<Shl64, ulong, ulong, uint>,
            ("shl", "b16") => &Maps.Scalar2<Shl16, ushort, ushort, uint>,
            ("shr", "u32" or "b32") => &Maps.Binary<Shr32, uint>,
            ("shr", "s32") => &Maps.Binary<Sar32, uint>,
            ("shr", "u64" or "b64") => &Maps.Scalar2<Shr64, ulong, ulong, uint>,
            ("shr", "s64") => &Maps.Scalar2<Sar64, long, long, uint>,
            ("shr", "u16" or "b16") => &Maps.Scalar2<Shr16, ushort, ushort, uint>,
            ("shr", "s16") => &Maps.Scalar2<Sar16, ushort, short, uint>,
            _ => throw op.Unknown(type),
        };
        return true;
    }

    private bool BuildScan(Instruction i, PtxInstruction p, Opcode op)
    {
        string type = op.Last();
        bool shift = op.Has("shiftamt");
        Take(i, p, 1, op.Stem == "brev" ? Width(type) : 4, Width(type), false);
        i.Run = (op.Stem, type, shift) switch
        {
            ("popc", "b32", false) => &Maps.Scalar1<Popc32, uint, uint>,
            ("popc", "b64", false) => &Maps.Scalar1<Popc64, uint, ulong>,
            ("clz", "b32", false) => &Maps.Scalar1<Clz32, uint, uint>,
            ("clz", "b64", false) => &Maps.Scalar1<Clz64, uint, ulong>,
            ("brev", "b32", false) => &Maps.Scalar1<Brev32, uint, uint>,
            ("brev", "b64", false) => &Maps.Scalar1<Brev64, ulong, ulong>,
            ("bfind", "u32", false) => &Maps.Scalar1<Bfind32, uint, uint>,
            ("bfind", "s32", false) => &Maps.Scalar1<BfindS32, uint, int>,
            ("bfind", "u64", false) => &Maps.Scalar1<Bfind64, uint, ulong>,
            ("bfind", "s64", false) => &Maps.Scalar1<BfindS64, uint, long>,
            ("bfind", "u32", true) => &Maps.Scalar1<BfindShift32<Bfind32>, uint, uint>,
            ("bfind", "u64", true) => &Maps.Scalar1<BfindShift64<Bfind64>, uint, ulong>,
            _ => throw op.Unknown(type),
        };
        return true;
    }

    private bool BuildExtract(Instruction i, PtxInstruction p, Opcode op)
    {
        string type = op.Last();
        Operands(p, 4);
        i.D = Result(p.Operands[0], Width(type));
        i.A = Row(p.Operands[1], Width(type));
        i.B = Row(p.Operands[2], 4);
        i.C = Row(p.Operands[3], 4);
        i.Run = type switch
        {
            "u32" => &Maps.Scalar3<BfeU32, uint, uint, uint, uint>,
            "s32" => &Maps.Scalar3<BfeS32, int, int, uint, uint>,
            "u64" => &Maps.Scalar3<BfeU64, ulong, ulong, uint, uint>,
            "s64" => &Maps.Scalar3<BfeS64, long, long, uint, uint>,
            _ => throw op.Unknown(type),
        };
        return true;
    }

    private bool BuildTable(Instruction i, PtxInstruction p, Opcode op)
    {
        string type = op.Last();
        if (type != "b32") throw op.Unknown(type);
        Operands(p, op.Stem == "lop3" ? 5 : 4);
        i.D = Result(p.Operands[0], 4);
        i.A = Row(p.Operands[1], 4);
        i.B = Row(p.Operands[2], 4);
        i.C = Row(p.Operands[3], 4);
        switch (op.Stem)
        {
            case "prmt":
                i.Run = &Moves.Table<Prmt>;
                break;
            case "lop3":
                i.Mode = (int)(Literal.Bits(p.Operands[4].Text, 4, false)
                    ?? throw new PtxException("lop3's table must be a number"));
                i.Run = &Moves.Table<Lop3>;
                break;
            default:
                i.Mode = (op.Any("l", "r") == "r" ? 1 : 0)
                    | (op.Any("wrap", "clamp") == "wrap" ? 2 : 0);
                i.Run = &Moves.Table<Funnel>;
                break;
        }
        return true;
    }
}
