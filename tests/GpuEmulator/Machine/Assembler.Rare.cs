using MiniCpmNative.GpuEmulator.Alu;
using MiniCpmNative.GpuEmulator.Ptx;
using unsafe Handler = delegate*<MiniCpmNative.GpuEmulator.Machine.Warp,
    MiniCpmNative.GpuEmulator.Machine.Instruction, void>;

namespace MiniCpmNative.GpuEmulator.Machine;

// What only some compilers emit: saturating and clamping integers, two-byte floats, slct, testp.
internal sealed unsafe partial class Assembler
{
    private bool BuildRareBinary(Instruction i, PtxInstruction p, Opcode op, string type)
    {
        if (type is "bf16" or "bf16x2" or "f16" or "f16x2")
        {
            bool nan = op.Has("NaN");
            if (op.Stem is "add" or "sub" or "mul") op.Has("rn");
            Take(i, p, 2, 4, 4, false);
            i.Run = type[0] == 'b'
                ? TwoByte<FloatToBrain, BrainToFloat>(op, nan, type.EndsWith("x2"))
                : TwoByte<FloatToHalf, HalfToFloat>(op, nan, type.EndsWith("x2"));
            return true;
        }
        bool relu = op.Has("relu"), saturate = type[0] != 'f' && op.Has("sat");
        if (!relu && !saturate) return false;
        if (type != "s32") throw op.Unknown(type);
        Take(i, p, 2, 4, 4, false);
        i.Run = (op.Stem, relu) switch
        {
            ("min", true) => &Maps.Binary<ReluLast<Min<int>>, int>,
            ("max", true) => &Maps.Binary<ReluLast<Max<int>>, int>,
            ("add", false) => &Maps.Scalar2<AddSaturated, int, int, int>,
            ("sub", false) => &Maps.Scalar2<SubSaturated, int, int, int>,
            _ => throw op.Unknown(type),
        };
        return true;
    }

    private static Handler TwoByte<TTo, TFrom>(Opcode op, bool nan, bool two)
        where TTo : IScalar<ushort, float> where TFrom : IScalar<float, ushort> =>
        (op.Stem, nan) switch
        {
            ("min", false) => TwoByte<Min2<TTo, TFrom>>(two),
            ("max", false) => TwoByte<Max2<TTo, TFrom>>(two),
            ("min", true) => TwoByte<MinNaN2<TTo, TFrom>>(two),
            ("max", true) => TwoByte<MaxNaN2<TTo, TFrom>>(two),
            ("add", false) => TwoByte<Add2<TTo, TFrom>>(two),
            ("sub", false) => TwoByte<Sub2<TTo, TFrom>>(two),
            ("mul", false) => TwoByte<Mul2<TTo, TFrom>>(two),
            _ => throw new PtxException($"{op.Stem} of two-byte floats is not known"),
        };

    private static Handler TwoByte<TOp>(bool two) where TOp : IScalar<ushort, ushort, ushort> =>
        two ? &Maps.Scalar2<Halves<TOp>, uint, uint, uint>
            : &Maps.Scalar2<TOp, ushort, ushort, ushort>;

    // slct d, a, b, c: a where c is not negative, else b (also where c is NaN).
    private bool BuildSignSelect(Instruction i, PtxInstruction p, Opcode op)
    {
        string by = op.Last(), type = op.Last();
        bool ftz = op.Has("ftz");
        int width = Width(type);
        Operands(p, 4);
        i.D = Result(p.Operands[0], width);
        i.A = Row(p.Operands[1], width, type[0] == 'f');
        i.B = Row(p.Operands[2], width, type[0] == 'f');
        i.C = Row(p.Operands[3], 4, by == "f32");
        i.Run = (by, width) switch
        {
            ("s32", 4) => &Maps.Scalar3<SelectBySign, uint, uint, uint, int>,
            ("s32", 8) => &Maps.Scalar3<SelectBySign, ulong, ulong, ulong, int>,
            ("f32", 4) => ftz ? &Maps.Scalar3<SelectBySignFlushed, uint, uint, uint, float>
                : &Maps.Scalar3<SelectBySign, uint, uint, uint, float>,
            ("f32", 8) => ftz ? &Maps.Scalar3<SelectBySignFlushed, ulong, ulong, ulong, float>
                : &Maps.Scalar3<SelectBySign, ulong, ulong, ulong, float>,
            _ => throw op.Unknown(by),
        };
        return true;
    }

    private bool BuildProperty(Instruction i, PtxInstruction p, Opcode op)
    {
        string property = op.Any("finite", "infinite", "number", "notanumber", "normal",
            "subnormal"), type = op.Last();
        Operands(p, 2);
        i.D = Predicate(p.Operands[0], out _);
        i.A = i.B = Row(p.Operands[1], Width(type), true);
        i.Mode = Predicates.None;
        i.Run = type switch
        {
            "f32" => Property<float>(property),
            "f64" => Property<double>(property),
            _ => throw op.Unknown(type),
        };
        return true;
    }

    private static Handler Property<T>(string property) where T : unmanaged,
        System.Numerics.IBinaryFloatingPointIeee754<T> => property switch
        {
            "finite" => &Predicates.Test<T, IsFinite<T>>,
            "infinite" => &Predicates.Test<T, IsInfinite<T>>,
            "number" => &Predicates.Set<IsNumber<T>, T>,
            "notanumber" => &Predicates.Set<IsNaN<T>, T>,
            "normal" => &Predicates.Test<T, IsNormal<T>>,
            "subnormal" => &Predicates.Test<T, IsSubnormal<T>>,
            _ => throw new PtxException("the property is missing"),
        };
}
