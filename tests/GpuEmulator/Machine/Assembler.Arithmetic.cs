using MiniCpmNative.GpuEmulator.Alu;
using MiniCpmNative.GpuEmulator.Ptx;
using unsafe Handler = delegate*<MiniCpmNative.GpuEmulator.Machine.Warp,
    MiniCpmNative.GpuEmulator.Machine.Instruction, void>;

namespace MiniCpmNative.GpuEmulator.Machine;

internal sealed unsafe partial class Assembler
{
    private bool BuildArithmetic(Instruction i, PtxInstruction p, Opcode op)
    {
        switch (op.Stem)
        {
            case "add" or "sub" or "mul" or "min" or "max" or "div" or "rem" or "copysign":
                return BuildBinary(i, p, op);
            case "mad" or "fma":
                return BuildMultiplyAdd(i, p, op);
            case "abs" or "neg" or "sqrt" or "rcp" or "rsqrt" or "ex2" or "lg2" or "sin" or "cos"
                or "tanh":
                return BuildUnary(i, p, op);
            case "setp": return BuildCompare(i, p, op);
            case "set": return BuildCompareWord(i, p, op);
            case "selp":
                string type = op.Last();
                Operands(p, 4);
                i.D = Result(p.Operands[0], Width(type));
                i.A = Row(p.Operands[1], Width(type), type[0] == 'f');
                i.B = Row(p.Operands[2], Width(type), type[0] == 'f');
                i.C = Predicate(p.Operands[3], out i.FlipC);
                i.Run = Width(type) == 8 ? &Predicates.Select<ulong> : &Predicates.Select<uint>;
                return true;
            case "slct": return BuildSignSelect(i, p, op);
            case "testp": return BuildProperty(i, p, op);
            case "cvt": return BuildConvert(i, p, op);
            default: return false;
        }
    }

    private void Take(Instruction i, PtxInstruction p, int sources, int dWidth, int width,
        bool isFloat)
    {
        Operands(p, sources + 1);
        (i.DWidth, i.AWidth) = (dWidth, width);
        i.D = Result(p.Operands[0], dWidth);
        i.A = Row(p.Operands[1], width, isFloat);
        if (sources > 1) i.B = Row(p.Operands[2], width, isFloat);
        if (sources > 2) i.C = Row(p.Operands[3], dWidth, isFloat);
    }

    private bool BuildBinary(Instruction i, PtxInstruction p, Opcode op)
    {
        string type = op.Last();
        if (type is "f32" or "f64") i.Flops = 1;
        if (BuildRareBinary(i, p, op, type)) return true;
        if (op.Stem == "mul" && type[0] != 'f') return BuildMultiply(i, p, op, type);
        Take(i, p, 2, Width(type), Width(type), type[0] == 'f');
        if (type == "f32")
        {
            i.Run = FloatBinary(i, op);
            return true;
        }
        if (type == "f64")
        {
            op.Has("rn");
            i.Run = op.Stem switch
            {
                "add" => &Maps.Binary<AddD, double>,
                "sub" => &Maps.Binary<SubD, double>,
                "mul" => &Maps.Binary<MulD, double>,
                "div" => &Maps.Binary<DivD, double>,
                "min" => &Maps.Binary<MinD, double>,
                "max" => &Maps.Binary<MaxD, double>,
                "copysign" => &Maps.Binary<CopySignD, double>,
                _ => throw op.Unknown(type),
            };
            return true;
        }
        i.Run = (op.Stem, type) switch
        {
            ("add", "u32" or "s32") => &Maps.Binary<Add<uint>, uint>,
            ("add", "u64" or "s64") => &Maps.Binary<Add<ulong>, ulong>,
            ("add", "u16" or "s16") => &Maps.Scalar2<Add16, ushort, ushort, ushort>,
            ("sub", "u32" or "s32") => &Maps.Binary<Sub<uint>, uint>,
            ("sub", "u64" or "s64") => &Maps.Binary<Sub<ulong>, ulong>,
            ("sub", "u16" or "s16") => &Maps.Scalar2<Sub16, ushort, ushort, ushort>,
            ("min", "u32") => &Maps.Binary<Min<uint>, uint>,
            ("min", "s32") => &Maps.Binary<Min<int>, int>,
            ("min", "u64") => &Maps.Binary<Min<ulong>, ulong>,
            ("min", "s64") => &Maps.Binary<Min<long>, long>,
            ("min", "u16") => &Maps.Scalar2<Min16<ushort>, ushort, ushort, ushort>,
            ("min", "s16") => &Maps.Scalar2<Min16<short>, ushort, short, short>,
            ("max", "u32") => &Maps.Binary<Max<uint>, uint>,
            ("max", "s32") => &Maps.Binary<Max<int>, int>,
            ("max", "u64") => &Maps.Binary<Max<ulong>, ulong>,
            ("max", "s64") => &Maps.Binary<Max<long>, long>,
            ("max", "u16") => &Maps.Scalar2<Max16<ushort>, ushort, ushort, ushort>,
            ("max", "s16") => &Maps.Scalar2<Max16<short>, ushort, short, short>,
            ("div", "u16") => &Maps.Scalar2<Div<ushort>, ushort, ushort, ushort>,
            ("div", "s16") => &Maps.Scalar2<Div<short>, short, short, short>,
            ("div", "u32") => &Maps.Scalar2<Div<uint>, uint, uint, uint>,
            ("div", "s32") => &Maps.Scalar2<Div<int>, int, int, int>,
            ("div", "u64") => &Maps.Scalar2<Div<ulong>, ulong, ulong, ulong>,
            ("div", "s64") => &Maps.Scalar2<Div<long>, long, long, long>,
            ("rem", "u16") => &Maps.Scalar2<Rem<ushort>, ushort, ushort, ushort>,
            ("rem", "s16") => &Maps.Scalar2<Rem<short>, short, short, short>,
            ("rem", "u32") => &Maps.Scalar2<Rem<uint>, uint, uint, uint>,
            ("rem", "s32") => &Maps.Scalar2<Rem<int>, int, int, int>,
            ("rem", "u64") => &Maps.Scalar2<Rem<ulong>, ulong, ulong, ulong>,
            ("rem", "s64") => &Maps.Scalar2<Rem<long>, long, long, long>,
            _ => throw op.Unknown(type),
        };
        return true;
    }

    private static Handler FloatBinary(Instruction i, Opcode op)
    {
        bool ftz = op.Has("ftz"), saturate = op.Has("sat"), nan = op.Has("NaN");
        string rounding = op.Any("rn", "rz", "rm", "rp", "approx", "full");
        if (op.Stem == "div" && rounding is ("approx" or "full"))
        {
            i.Mode2 = ftz ? 1 : 0;
            i.Mode = rounding == "approx" ? 1 : 0;
            return &Approximate.Divide;
        }
        if (rounding is "rz" or "rm" or "rp")
        {
            if (ftz || saturate)
                throw new PtxException($".{rounding} with .ftz or .sat is not known");
            return (op.Stem, rounding) switch
            {
                ("add", "rz") => &Maps.Scalar2<DirectedAdd<TowardZero>, float, float, float>,
                ("add", "rm") => &Maps.Scalar2<DirectedAdd<Down>, float, float, float>,
                ("add", "rp") => &Maps.Scalar2<DirectedAdd<Up>, float, float, float>,
                ("sub", "rz") => &Maps.Scalar2<DirectedSub<TowardZero>, float, float, float>,
                ("sub", "rm") => &Maps.Scalar2<DirectedSub<Down>, float, float, float>,
                ("sub", "rp") => &Maps.Scalar2<DirectedSub<Up>, float, float, float>,
                ("mul", "rz") => &Maps.Scalar2<DirectedMul<TowardZero>, float, float, float>,
                ("mul", "rm") => &Maps.Scalar2<DirectedMul<Down>, float, float, float>,
                ("mul", "rp") => &Maps.Scalar2<DirectedMul<Up>, float, float, float>,
                _ => throw new PtxException($"{op.Stem}.{rounding} is not known"),
            };
        }
        return (op.Stem, nan) switch
        {
            ("add", false) => Float2<AddF>(ftz, saturate),
            ("sub", false) => Float2<SubF>(ftz, saturate),
            ("mul", false) => Float2<MulF>(ftz, saturate),
            ("div", false) => Float2<DivF>(ftz, saturate),
            ("min", false) => Float2<MinF>(ftz, saturate),
            ("max", false) => Float2<MaxF>(ftz, saturate),
            ("min", true) => Float2<MinNaN>(ftz, saturate),
            ("max", true) => Float2<MaxNaN>(ftz, saturate),
            ("copysign", false) => Float2<CopySignF>(ftz, saturate),
            _ => throw new PtxException($"{op.Stem} is not known for .f32"),
        };
    }

    private static Handler Float2<TOp>(bool ftz, bool saturate) where TOp
        : IBinary<float> => (ftz, saturate) switch
        {
            (false, false) => &Maps.Binary<TOp, float>,
            (true, false) => &Maps.Binary<Ftz2<TOp>, float>,
            (false, true) => &Maps.Binary<Sat2<TOp>, float>,
            _ => &Maps.Binary<Sat2<Ftz2<TOp>>, float>,
        };

    private bool BuildMultiply(Instruction i, PtxInstruction p, Opcode op, string type)
    {
        string part = op.Any("lo", "hi", "wide");
        int width = Width(type);
        Take(i, p, 2, part == "wide" && type is ("u32" or "s32") ? 8 : width, width, false);
        i.Run = (part, type) switch
        {
            ("lo", "u32" or "s32") => &Maps.Binary<MulLo<uint>, uint>,
            ("lo", "u64" or "s64") => &Maps.Binary<MulLo<ulong>, ulong>,
            ("lo", "u16" or "s16") => &Maps.Scalar2<Mul16, ushort, ushort, ushort>,
            ("hi", "u16") => &Maps.Scalar2<MulHi<ushort, uint>, ushort, ushort, ushort>,
            ("hi", "s16") => &Maps.Scalar2<MulHiS16, ushort, short, short>,
            ("hi", "u32") => &Maps.Binary<MulHiU32, uint>,
            ("hi", "s32") => &Maps.Scalar2<MulHi<int, long>, int, int, int>,
            ("hi", "u64") => &Maps.Scalar2<MulHi<ulong, UInt128>, ulong, ulong, ulong>,
            ("hi", "s64") => &Maps.Scalar2<MulHi<long, Int128>, long, long, long>,
            ("wide", "u16") => &Maps.Scalar2<MulWide<uint, ushort>, uint, ushort, ushort>,
            ("wide", "s16") => &Maps.Scalar2<MulWide<int, short>, int, short, short>,
            ("wide", "u32") => &Moves.MulWideUnsigned,
            ("wide", "s32") => &Moves.MulWideSigned,
            _ => throw op.Unknown(type),
        };
        return true;
    }

    private bool BuildMultiplyAdd(Instruction i, PtxInstruction p, Opcode op)
    {
        string type = op.Last(), part = op.Any("lo", "hi", "wide");
        int width = Width(type);
        bool isFloat = type is "f32" or "f64";
        if (isFloat) i.Flops = 2;
        Take(i, p, 3, part == "wide" && type is ("u32" or "s32") ? 8 : width, width, isFloat);
        if (type == "f32")
        {
            bool ftz = op.Has("ftz"), saturate = op.Has("sat");
            i.Run = (op.Any("rn", "rz", "rm", "rp"), ftz, saturate) switch
            {
                ("rn", false, false) => &Maps.Ternary<FmaF, float>,
                ("rn", true, false) => &Maps.Ternary<Ftz3<FmaF>, float>,
                ("rn", false, true) => &Maps.Ternary<Sat3<FmaF>, float>,
                ("rn", true, true) => &Maps.Ternary<Sat3<Ftz3<FmaF>>, float>,
                ("rz", false, false) =>
                    &Maps.Scalar3<DirectedFma<TowardZero>, float, float, float, float>,
                ("rm", false, false) =>
                    &Maps.Scalar3<DirectedFma<Down>, float, float, float, float>,
                ("rp", false, false) => &Maps.Scalar3<DirectedFma<Up>, float, float, float, float>,
                _ => throw new PtxException("this rounding of fma is not known"),
            };
            return true;
        }
        if (type is "bf16" or "bf16x2" or "f16" or "f16x2") i.Flops = type.EndsWith("x2") ? 4 : 2;
        if (isFloat || i.Flops > 0) op.Has("rn");
        i.Run = (part, type) switch
        {
            ("", "f64") => &Maps.Ternary<FmaD, double>,
            ("", "bf16") =>
                &Maps.Scalar3<Fma16<FloatToBrain, BrainToFloat>, ushort, ushort, ushort, ushort>,
            ("", "bf16x2") =>
                &Maps.Scalar3<Fma16X2<FloatToBrain, BrainToFloat>, uint, uint, uint, uint>,
            ("", "f16") =>
                &Maps.Scalar3<Fma16<FloatToHalf, HalfToFloat>, ushort, ushort, ushort, ushort>,
            ("", "f16x2") =>
                &Maps.Scalar3<Fma16X2<FloatToHalf, HalfToFloat>, uint, uint, uint, uint>,
            ("lo", "u32" or "s32") => &Maps.Ternary<MadLo<uint>, uint>,
            ("lo", "u64" or "s64") => &Maps.Ternary<MadLo<ulong>, ulong>,
            ("lo", "u16" or "s16") => &Maps.Scalar3<Mad16, ushort, ushort, ushort, ushort>,
            ("hi", "u32") => &Maps.Scalar3<MadHi<uint, ulong>, uint, uint, uint, uint>,
            ("hi", "s32") => &Maps.Scalar3<MadHi<int, long>, int, int, int, int>,
            ("wide", "u16") => &Maps.Scalar3<MadWide<uint, ushort>, uint, ushort, ushort, uint>,
            ("wide", "s16") => &Maps.Scalar3<MadWide<int, short>, int, short, short, int>,
            ("wide", "u32") => &Maps.Scalar3<MadWide<ulong, uint>, ulong, uint, uint, ulong>,
            ("wide", "s32") => &Maps.Scalar3<MadWide<long, int>, long, int, int, long>,
            _ => throw op.Unknown(type),
        };
        return true;
    }

    private bool BuildUnary(Instruction i, PtxInstruction p, Opcode op)
    {
        string type = op.Last();
        Take(i, p, 1, Width(type), Width(type), type[0] == 'f');
        bool ftz = op.Has("ftz"), approximate = op.Has("approx");
        if (!approximate) op.Has("rn");
        i.Mode2 = ftz ? 1 : 0;
        if (type[0] == 'f' && op.Stem is not ("abs" or "neg")) i.Flops = 1;
        i.Run = (op.Stem, type, approximate) switch
        {
            ("abs", "f32", false) => ftz ? &Maps.Unary<Ftz1<AbsF>, float>
                : &Maps.Unary<AbsF, float>,
            ("neg", "f32", false) => ftz ? &Maps.Unary<Ftz1<NegF>, float>
                : &Maps.Unary<NegF, float>,
            ("sqrt", "f32", false) => ftz ? &Maps.Unary<Ftz1<SqrtF>, float>
                : &Maps.Unary<SqrtF, float>,
            ("rcp", "f32", false) => ftz ? &Maps.Unary<Ftz1<RcpF>, float>
                : &Maps.Unary<RcpF, float>,
            ("sqrt", "f32", true) => &Approximate.Run1<SqrtApprox>,
            ("rcp", "f32", true) => &Approximate.Run1<RcpApprox>,
            ("rsqrt", "f32", true) => &Approximate.Run1<RsqrtApprox>,
            ("ex2", "f32", true) => &Approximate.Run1<Ex2>,
            ("lg2", "f32", true) => &Approximate.Run1<Lg2>,
            ("sin", "f32", true) => &Approximate.Run1<SinApprox>,
            ("cos", "f32", true) => &Approximate.Run1<CosApprox>,
            ("tanh", "f32", true) => &Approximate.Run1<TanhApprox>,
            ("abs", "f64", false) => &Maps.Unary<AbsD, double>,
            ("neg", "f64", false) => &Maps.Unary<NegD, double>,
            ("sqrt", "f64", false) => &Maps.Unary<SqrtD, double>,
            ("rcp", "f64", _) => &Maps.Unary<RcpD, double>,
            ("abs", "s32", false) => &Maps.Unary<Abs<int>, int>,
            ("abs", "s64", false) => &Maps.Unary<Abs<long>, long>,
            ("abs", "s16", false) => &Maps.Scalar1<Abs16, ushort, short>,
            ("neg", "s32", false) => &Maps.Unary<Neg<int>, int>,
            ("neg", "s64", false) => &Maps.Unary<Neg<long>, long>,
            ("neg", "s16", false) => &Maps.Scalar1<Neg16, ushort, ushort>,
            _ => throw op.Unknown(type),
        };
        return true;
    }
}
